"""Hardware, data parallelism, the loss and the optimizer of a step."""
