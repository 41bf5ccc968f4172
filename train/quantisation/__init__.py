"""Quantisation-aware training on the grid of the exported file."""
