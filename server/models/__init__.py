"""Loaded models: which ones there are, a worker for each, and what is counted of them."""
