"""`efficientllm-plan` and `efficientllm-fit`: predict costs before training."""
