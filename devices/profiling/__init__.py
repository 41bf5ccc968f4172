"""Measurement of a latency profile: export stacks of layers, time them in turn, and fit the cost of each part."""
