"""Pruning-aware pretraining: from a larger pretrained model to a smaller, irregular one."""
