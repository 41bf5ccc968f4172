"""One interface over the inference engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np


class Engine(Protocol):
    """A loaded model that evaluates tokens one sequence at a time. V is the vocabulary size.

    A class of engines is called with the model's file and EngineOptions; ArtefactError where the file is none of its
    models. An engine need not care for threads or for calls after `close`: programs get it as an `OwnedEngine`, which
    does. Only `tokenize` and `token_bytes` are called while another thread evaluates.
    """

    context_length: int
    """Tokens that fit, prompt and answer together."""
    vocab_size: int
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    chat_template: str | None
    """Jinja template of the tokenizer, where it has one."""
    bos_token: str
    eos_token: str
    adds_bos: bool
    """Whether plain text is preceded by the BOS token."""
    load_ms: float
    kv_cache_bytes: int
    """Key/value caches at full context; 0 where the file does not tell."""

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids; `special` turns text such as <|im_end|> into its control token."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes (possibly part of a character) of a token; b"" for control tokens."""
        ...

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Make `tokens` the evaluated sequence and return the last one's logits, fp32 [V].

        What the cache already holds of them is reused; ContextOverflowError where they do not fit.
        """
        ...

    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits, fp32 [V]."""
        ...

    def evaluate(self, tokens: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Make `tokens` the evaluated sequence; yields the logits of positions first, first + 1, ... as fp32 [n, V]."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...
