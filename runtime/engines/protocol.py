"""Interface of the inference engines. V is the vocabulary size, H the hidden size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..base.errors import ContextOverflowError
from .pass_sizes import PassTimes
from .speculation import Speculation


class Chunk(NamedTuple):
    """Tokens, at least one, that a pass appends to one sequence."""

    sequence: int
    tokens: Sequence[int]
    wants_logits: bool = True
    """Return the logits of the last token."""
    num_drafted: int = 0
    """Number of last tokens that are only proposed. The logits of each, and of the token before, are wanted."""


class CacheFullError(ContextOverflowError):
    """The KV cache has no room for the tokens of a pass. Nothing was appended."""


class EvaluationInterrupted(Exception):  # noqa: N818  no error
    """`Engine.interrupt` was called. Nothing was appended."""


@dataclass
class EngineTraits:
    """Abilities and choices of an engine for one model on this machine. The defaults are those of a simple engine."""

    cuts_sequences: bool = True
    """False if a sequence is emptied or kept whole, as the state of a recurrent model."""
    crowded_slots: float = math.inf
    """Cached tokens of all sequences from which long chats start in turn, because all sequences share one cache."""
    pass_times: PassTimes | None = None
    """Measured times of passes. With them, a pass decodes as many sequences as are fastest, without them all."""
    speculation: Speculation | None = None
    """Decides on proposed tokens of answers, None if there are none."""
    max_rows: int = 1
    """Largest number of logits of one chunk. More than one allow drafted tokens."""
    settings: str = ""
    """Choices made for this machine, such as the attention kernel."""


class Engine(Protocol):
    """A loaded model that evaluates tokens of one or several sequences.

    An engine class is called with the path of the model's file and EngineOptions. It raises ArtefactError if it cannot
    load the file. `EngineScheduler` serialises the calls, decides which sequence holds which tokens, and calls nothing
    after `close`. Only `tokenize`, `token_bytes`, `interrupt` and `Embedder.embed` are called while another thread
    evaluates.
    """

    context_length: int
    """Tokens of prompt and answer together."""
    vocab_size: int
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    chat_template: str | None
    """Jinja template of the tokenizer, if it has one."""
    bos_token: str
    eos_token: str
    control_texts: frozenset[str]
    """Texts that `tokenize` reads as control tokens with `special`, and as plain text without it."""
    adds_bos: bool
    """Plain text is preceded by the BOS token."""
    load_ms: float
    kv_cache_bytes: int
    """Size of the KV cache of all `cache_slots` tokens; 0 if unknown."""
    num_sequences: int
    """Number of sequences with a cache. They are numbered from 0."""
    max_batch: int
    """Largest number of tokens of one `extend`."""
    traits: EngineTraits

    @property
    def cache_slots(self) -> int:
        """Return the number of tokens that the caches of all sequences hold together."""
        ...

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Return token ids; with `special`, text such as <|im_end|> becomes its control token."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, possibly part of a character; b"" for control tokens."""
        ...

    def extend(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """Append tokens to sequences; return logits, fp32 [V], of the chunks that want them, in order.

        Those of a chunk with n drafted tokens are [1 + n, V].

        The chunks have different sequences and at most `max_batch` tokens together. Raise CacheFullError, or
        EvaluationInterrupted after `interrupt`. In both cases no sequence has changed.
        """
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Remove all but the first `length` tokens of a sequence."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Replace sequence `target` by the first `length` tokens of sequence `source`."""
        ...

    def interrupt(self) -> None:
        """End the `extend` in progress early if possible, and every later one until `resume`."""
        ...

    def resume(self) -> None:
        """Undo `interrupt`."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@runtime_checkable
class StateKeeper(Protocol):
    """An engine whose sequences can be written and read again."""

    state_format: str
    """Build and settings that the bytes depend on, beside the model."""

    def sequence_state(self, sequence: int) -> memoryview:
        """Return the state of a sequence, in memory that can be written."""
        ...

    def restore_sequence(self, sequence: int, state: memoryview, length: int) -> bool:
        """Fill an empty sequence with a state of `length` tokens. Return False, and leave it empty, if that fails."""
        ...


@runtime_checkable
class PassTimer(Protocol):
    """An engine that measures how the time of a pass grows with its sequences."""

    def measure_passes(self, should_stop: Callable[[], bool]) -> None:
        """Set `EngineTraits.pass_times`, as measured now or earlier, and change no sequence.

        Leave them as they are if `should_stop` becomes true.
        """
        ...


Pooling = Literal["mean", "last"]


@runtime_checkable
class Embedder(Protocol):
    """An engine that gives the hidden state of a text."""

    def embed(self, tokens: Sequence[int], pooling: Pooling) -> np.ndarray:
        """Return the mean of the states after the last layer, or the last token's, fp32 [H] of unit length.

        The call changes no sequence and may run while another thread evaluates.
        """
        ...
