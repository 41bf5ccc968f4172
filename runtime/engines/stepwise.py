"""Base class of engines with a separate tokenizer file and programs that take one sequence at a time."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .hf_tokenizer import HfTokenizer
from .protocol import Chunk, EngineTraits, EvaluationInterrupted


class StepwiseEngine(abc.ABC):
    """Reads the tokenizer in the model's folder, serves sequences in turn, and evaluates one position per pass.

    A subclass evaluates tokens in `_evaluate`, which appends them to `_tokens`, and shortens the cache in `_truncate`.
    One with several caches also sets `num_sequences`, switches between them in `_select` and copies one in `_copy`.
    """

    context_length: int
    num_sequences = 1
    max_batch = 512

    def __init__(self, folder: Path) -> None:
        self.traits = EngineTraits()
        self.tokenizer = HfTokenizer(folder)
        self.chat_template = self.tokenizer.chat_template
        self.bos_token, self.eos_token = self.tokenizer.bos_token, self.tokenizer.eos_token
        self.control_texts, self.adds_bos = self.tokenizer.control_texts, self.tokenizer.adds_bos
        self._sequences: list[list[int]] = [[] for _ in range(self.num_sequences)]
        self._current = 0
        self._tokens = self._sequences[0]
        """Tokens in the cache of the current sequence."""
        self._is_interrupted = False

    @property
    def cache_slots(self) -> int:
        return self.num_sequences * self.context_length

    def tokenize(self, text: str, special: bool) -> list[int]:
        return self.tokenizer.tokenize(text, special)

    def token_bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token)

    def extend(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        lengths = [len(self._sequences[chunk.sequence]) for chunk in chunks]
        rows = []
        try:
            for chunk in chunks:
                self._stop_if_interrupted()
                self._switch_to(chunk.sequence)
                logits = self._evaluate(list(chunk.tokens))
                if chunk.wants_logits:
                    rows.append(logits)
        except Exception:  # `extend` must change all sequences or none
            for chunk, length in zip(chunks, lengths, strict=True):
                self.truncate(chunk.sequence, length)
            raise
        return rows

    def truncate(self, sequence: int, length: int) -> None:
        if length < len(self._sequences[sequence]):
            self._switch_to(sequence)
            self._truncate(length)
            del self._tokens[length:]

    def copy(self, source: int, target: int, length: int) -> None:
        self._switch_to(target)
        self._copy(source, length)
        self._tokens[:] = self._sequences[source][:length]  # in place: `_sequences` holds the same list

    def interrupt(self) -> None:
        """Start no further call of the program until `resume`. A subclass may also stop the call in progress."""
        self._is_interrupted = True

    def resume(self) -> None:
        self._is_interrupted = False

    def _stop_if_interrupted(self) -> None:
        if self._is_interrupted:
            raise EvaluationInterrupted

    def _switch_to(self, sequence: int) -> None:
        if sequence != self._current:
            self._current, self._tokens = sequence, self._sequences[sequence]
            self._select(sequence)

    def _select(self, sequence: int) -> None:  # noqa: B027  engines with one cache have nothing to select
        """Switch to the cache of `sequence`."""

    def _copy(self, source: int, length: int) -> None:
        """Copy the first `length` positions of sequence `source` into the cache of the current sequence."""
        raise NotImplementedError

    @abc.abstractmethod
    def _truncate(self, length: int) -> None:
        """Keep the first `length` positions of the cache."""

    @abc.abstractmethod
    def _evaluate(self, tokens: list[int]) -> np.ndarray:
        """Append at least one token and return the last one's logits, fp32 [V]."""
