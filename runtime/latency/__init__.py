"""What a decoder of any shape takes on a device that was measured: the latency table and the workload."""
