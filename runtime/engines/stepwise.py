"""What engines share whose files hold no tokenizer and whose programs take one sequence at a time."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .hf_tokenizer import HfTokenizer
from .protocol import EvaluationInterrupted, Part


class StepwiseEngine(abc.ABC):
    """Tokenizer beside the model, sequences that take turns, and `evaluate` as one pass per position.

    An engine evaluates tokens in `_evaluate`, which appends them to `_tokens`, and forgets in `_truncate`. One that can
    keep several caches sets `num_sequences`, goes to another one in `_select` and copies in `_copy`.
    """

    context_length: int
    num_sequences = 1
    max_batch = 512
    settings = ""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = HfTokenizer(folder)
        self.chat_template = self.tokenizer.chat_template
        self.bos_token, self.eos_token = self.tokenizer.bos_token, self.tokenizer.eos_token
        self.control_texts, self.adds_bos = self.tokenizer.control_texts, self.tokenizer.adds_bos
        self._sequences: list[list[int]] = [[] for _ in range(self.num_sequences)]
        self._current = 0
        self._tokens = self._sequences[0]
        """What the current sequence holds."""
        self._is_interrupted = False

    @property
    def cache_slots(self) -> int:
        return self.num_sequences * self.context_length

    def tokenize(self, text: str, special: bool) -> list[int]:
        return self.tokenizer.tokenize(text, special)

    def token_bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token)

    def extend(self, parts: Sequence[Part]) -> list[np.ndarray]:
        lengths, rows = [len(self._sequences[part.sequence]) for part in parts], []
        try:
            for part in parts:
                self._stop_if_interrupted()
                self._go_to(part.sequence)
                logits = self._evaluate(list(part.tokens))
                if part.wants_logits:
                    rows.append(logits)
        except Exception:
            for part, length in zip(parts, lengths, strict=True):
                self.truncate(part.sequence, length)
            raise
        return rows

    def truncate(self, sequence: int, length: int) -> None:
        if length < len(self._sequences[sequence]):
            self._go_to(sequence)
            self._truncate(length)
            del self._tokens[length:]

    def copy(self, source: int, target: int, length: int) -> None:
        self._go_to(target)
        self._copy(source, length)
        self._tokens[:] = self._sequences[source][:length]

    def interrupt(self) -> None:
        """Nothing that has not begun will: no other sequence, and no other piece of a prompt of an engine that takes it
        by pieces. One that can also stops what has begun."""
        self._is_interrupted = True

    def resume(self) -> None:
        self._is_interrupted = False

    def _stop_if_interrupted(self) -> None:
        if self._is_interrupted:
            raise EvaluationInterrupted

    def evaluate(self, tokens: Sequence[int], first: int, held: int) -> Iterator[np.ndarray]:
        self.resume()
        self._go_to(0)
        yield self._evaluate(list(tokens[held : first + 1]))[None]
        for token in tokens[first + 1 :]:
            yield self._evaluate([token])[None]

    def _go_to(self, sequence: int) -> None:
        if sequence != self._current:
            self._current, self._tokens = sequence, self._sequences[sequence]
            self._select(sequence)

    def _select(self, sequence: int) -> None:  # noqa: B027  those that keep one cache have nothing to select
        """Go to another sequence's cache."""

    def _copy(self, source: int, length: int) -> None:
        """Copy the first `length` positions of the cache of sequence `source` into the current one's."""
        raise NotImplementedError

    @abc.abstractmethod
    def _truncate(self, length: int) -> None:
        """Forget what the caches hold beyond `length`."""

    @abc.abstractmethod
    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        """Append `tokens`, at least one, and return the last one's logits, fp32 [V]."""
