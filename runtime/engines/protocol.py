"""One interface over the inference engines.

What passes over the next tokens of several sequences take, and so how many of them a pass should serve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

AS_GOOD = 0.97
"""Share of the best speed from which more answers in a pass are preferred: each waits less."""
MOST_RANGES = 3
"""Of sizes that are said one by one: more of them are noise."""


@dataclass(frozen=True)
class PassTimes:
    """Milliseconds of a pass over one more token of 1, 2, ... chats."""

    milliseconds: tuple[float, ...]

    @property
    def largest(self) -> int:
        return len(self.milliseconds)

    def answers(self, waiting: int, beside: int = 0) -> int:
        """How many of `waiting` answers get their next token in one pass beside so many tokens of prompts: as many as
        give the most tokens per second; the others have their turn in the next pass."""
        speeds = {number: (number + beside) / self._of(number + beside) for number in range(1, waiting + 1)}
        least = AS_GOOD * max(speeds.values())
        return max(number for number, speed in speeds.items() if speed >= least)

    def _of(self, tokens: int) -> float:
        """Of as many tokens; beyond what was measured each takes what one of the largest pass does."""
        most = self.largest
        return self.milliseconds[tokens - 1] if tokens <= most else self.milliseconds[-1] * tokens / most

    def __str__(self) -> str:
        """Which sizes passes have, neighbours as a range; of many pieces only the first and the last."""
        sizes = sorted({self.answers(waiting) for waiting in range(1, self.largest + 1)})
        starts = [size for size in sizes if size - 1 not in sizes]
        ends = [size for size in sizes if size + 1 not in sizes]
        if len(starts) > MOST_RANGES:
            starts, ends = starts[:1], ends[-1:]
        ranges = [f"{low}" if low == high else f"{low} to {high}" for low, high in zip(starts, ends, strict=True)]
        found = " or ".join([*filter(None, [", ".join(ranges[:-1])]), ranges[-1]])
        return f"{found} answer{'' if sizes == [1] else 's'} a pass"

    @classmethod
    def parse(cls, text: str, sequences: int) -> PassTimes | None:
        """What `to_text` gave for so many sequences; None for anything else."""
        try:
            values = tuple(map(float, json.loads(text)))
        except (ValueError, TypeError, RecursionError):
            return None
        is_sound = len(values) == sequences and all(math.isfinite(value) and value > 0 for value in values)
        return cls(values) if is_sound else None

    def to_text(self) -> str:
        return json.dumps([max(round(value, 4), 1e-4) for value in self.milliseconds])


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
