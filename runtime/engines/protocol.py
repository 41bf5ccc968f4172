"""Interface of the inference engines. V is the vocabulary size, H the hidden size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np


class Chunk(NamedTuple):
    """Tokens, at least one, that a pass appends to one sequence."""

    sequence: int
    tokens: Sequence[int]
    wants_logits: bool = True
    """Return the logits of the last token."""
    num_drafted: int = 0
    """Number of last tokens that are only proposed. The logits of each, and of the token before, are wanted."""


class CacheFullError(Exception):
    """The KV cache has no room for the tokens of a pass. Nothing was appended."""


class EvaluationInterrupted(Exception):  # noqa: N818  no error
    """`Engine.interrupt` was called. Nothing was appended."""


class Engine(Protocol):
    """A loaded model that evaluates tokens of one or several sequences.

    An engine class is called with the path of the model's file and EngineOptions. It raises ArtefactError if it cannot
    load the file. `EngineScheduler` serialises the calls, decides which sequence holds which tokens, and calls nothing
    after `close`. Only `tokenize`, `token_bytes`, `interrupt` and `Embedder.embed` are called while another thread
    evaluates.

    With a `pass_times: PassTimes` attribute, a pass decodes as many sequences as are fastest, without it all. An engine
    that is a `PassTimer` (`scheduling_policy`) is asked to measure them.
    The sequences of an engine with a false `cuts_sequences` attribute, a recurrent model, are emptied or kept whole.
    An engine whose sequences share one cache has `crowded_slots`: with more tokens in it, long chats start in turn.
    Only an engine with a `speculation: Speculation` attribute gets chunks with drafted tokens.
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
    settings: str
    """Choices made for this machine, such as the attention kernel; "" if there are none."""

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

    def evaluate(self, tokens: Sequence[int], first: int, held: int) -> Iterator[np.ndarray]:
        """Make `tokens` sequence 0; yield the logits of positions `first`, `first` + 1, ..., fp32 [n, V] each.

        Sequence 0 holds the first `held` <= `first` tokens already. The other sequences are empty.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@runtime_checkable
class StateKeeper(Protocol):
    """An engine whose sequences can be written and read again."""

    state_format: str
    """Build and settings that the bytes depend on, beside the model."""

    def sequence_state(self, sequence: int) -> bytes:
        """Return the state of a sequence."""
        ...

    def restore_sequence(self, sequence: int, state: bytes, length: int) -> bool:
        """Fill an empty sequence with a state of `length` tokens. Return False, and leave it empty, if that fails."""
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
