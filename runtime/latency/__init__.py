"""Predict the time of a decoder shape on a measured device: latency table and workload."""
