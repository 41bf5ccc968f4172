"""Prune a vocabulary: rank its tokens, rewrite its tokenizer, and align text in two tokenizers."""
