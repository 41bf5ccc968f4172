"""`efficientllm-plan`: what pruning a model buys on a device, before anything is trained."""
