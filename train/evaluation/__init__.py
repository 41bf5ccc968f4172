"""Measuring what quality a model kept: perplexity, and the paper's tasks through lm-evaluation-harness."""
