"""What a step computes on and with: hardware, data parallelism, the loss."""
