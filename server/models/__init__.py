"""Loaded models: the pool that loads and unloads them, and a worker for each."""
