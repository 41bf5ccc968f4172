"""Measuring a device's latency table: stacks of layers are exported, timed in turn, and taken apart into parts."""
