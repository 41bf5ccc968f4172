"""From corpora to packed windows of tokens."""
