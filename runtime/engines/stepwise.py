"""What engines share whose files hold no tokenizer and whose programs return the last token's logits only."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .hf_tokenizer import HfTokenizer
from .prefix import check_room, reusable_prefix


class StepwiseEngine(abc.ABC):
    """Tokenizer beside the model, prefix reuse, and `evaluate` as one decode per position.

    An engine evaluates tokens in `_evaluate`, which appends them to `_tokens`, and forgets in `_truncate`.
    """

    context_length: int

    def __init__(self, folder: Path) -> None:
        self.tokenizer = HfTokenizer(folder)
        self.chat_template = self.tokenizer.chat_template
        self.bos_token, self.eos_token = self.tokenizer.bos_token, self.tokenizer.eos_token
        self.adds_bos = self.tokenizer.adds_bos
        self._tokens: list[int] = []

    def tokenize(self, text: str, special: bool) -> list[int]:
        return self.tokenizer.tokenize(text, special)

    def token_bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        common = reusable_prefix(self._tokens, tokens, self.context_length)
        self._truncate(common)
        self._tokens = list(tokens[:common])
        return self._evaluate(list(tokens[common:]))

    def decode(self, token: int) -> np.ndarray:
        check_room(len(self._tokens), self.context_length)
        return self._evaluate([token])

    def evaluate(self, tokens: Sequence[int], first: int) -> Iterator[np.ndarray]:
        yield self.prefill(tokens[: first + 1])[None]
        for token in tokens[first + 1 :]:
            yield self.decode(token)[None]

    @abc.abstractmethod
    def _truncate(self, length: int) -> None:
        """Forget what the caches hold beyond `length`."""

    @abc.abstractmethod
    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        """Append `tokens`, at least one, and return the last one's logits, fp32 [V]."""
