"""Measure a model: perplexity, chat answers, questions of fact, and tasks of lm-evaluation-harness."""
