"""Corpora, chats and packed windows of tokens."""
