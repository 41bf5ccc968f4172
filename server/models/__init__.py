"""Loaded models: the pool that loads and unloads them, a worker for each, and metrics."""
