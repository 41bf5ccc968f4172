"""One interface over the inference engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from .pass_times import PassTimes


class Part(NamedTuple):
    """Tokens, at least one, to be appended to one sequence."""

    sequence: int
    tokens: Sequence[int]
    wants_logits: bool = True
    """Of the last token."""


class CacheFullError(Exception):
    """The sequences hold so much that nothing more fits; nothing was appended."""


class EvaluationInterrupted(Exception):  # noqa: N818  nothing is wrong
    """Somebody called `interrupt`; nothing was appended."""


class Engine(Protocol):
    """A loaded model that evaluates tokens of one or several sequences. V is the vocabulary size.

    A class of engines is called with the model's file and EngineOptions; ArtefactError where the file is none of its
    models. An engine need not care for threads, for which sequence holds what or for calls after `close`: programs get
    it as an `OwnedEngine`, which does. `tokenize`, `token_bytes` and `interrupt` are called while another thread
    evaluates.
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
    control_texts: frozenset[str]
    """What `tokenize` reads as control tokens where it is told to (`special`), and as plain text otherwise."""
    adds_bos: bool
    """Whether plain text is preceded by the BOS token."""
    load_ms: float
    kv_cache_bytes: int
    """Key/value caches of all `cache_slots`; 0 where the file does not tell."""
    num_sequences: int
    """Sequences, numbered from 0, whose caches stand side by side."""
    max_batch: int
    """Tokens that one `extend` takes."""
    settings: str
    """What was chosen for this machine, such as the attention kernel; "" where nothing was."""

    @property
    def cache_slots(self) -> int:
        """Tokens that the caches of all sequences hold together."""
        ...

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids; `special` turns text such as <|im_end|> into its control token."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes (possibly part of a character) of a token; b"" for control tokens."""
        ...

    def extend(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """Append tokens to sequences, each of which comes once; logits fp32 [V] of the parts that want them, in order.

        At most `max_batch` tokens together. CacheFullError, or EvaluationInterrupted where `interrupt` was called
        meanwhile: then no sequence has changed.
        """
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Forget what a sequence holds beyond its first `length` tokens."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of sequence `source` all that `target` holds."""
        ...

    def interrupt(self) -> None:
        """Let the `extend` in progress end early, if it can, and every later one until `resume`."""
        ...

    def resume(self) -> None:
        """Take back what `interrupt` said."""
        ...

    def evaluate(self, tokens: Sequence[int], first: int, held: int) -> Iterator[np.ndarray]:
        """Make `tokens` sequence 0, which holds the first `held` <= `first` of them, while no other holds anything.

        Yields the logits of positions first, first + 1, ... as fp32 [n, V].
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@runtime_checkable
class Timed(Protocol):
    """An engine that knows which passes are worth their time; others are given all that wait."""

    pass_times: PassTimes | None


Pooling = Literal["mean", "last"]


@runtime_checkable
class Embedder(Protocol):
    """An engine that shows what a model makes of a text inside. H is the hidden size."""

    def embed(self, tokens: Sequence[int], pooling: Pooling) -> np.ndarray:
        """fp32 [H] of unit length: the mean of the states after the last layer, or the last token's.

        Called while another thread evaluates: it touches no sequence.
        """
        ...
