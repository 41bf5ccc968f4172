"""Artefacts and the engines that run them, behind one interface."""
