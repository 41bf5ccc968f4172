"""Measure which llama.cpp settings are fastest for a model on this machine, when it is new there.

Attention is measured at the first load, because a context cannot change it. Passes are measured at the first load, or
by a server while no request waits. Two choices depend on the CPU in ways that no rule covers:

- Attention kernel and cache type. The flash attention kernel for CPUs is slow for passes of fewer than 64 tokens over
  an fp16 cache: on some CPUs by half, on others hardly. Over a Q8_0 cache it is as fast as the plain kernel, which pads
  the values of an irregular model to its widest layer.
- Pass size. A single token has kernels of its own. The kernels for several tokens gain nothing below eight rows on
  some CPUs (with q8_0 on AVX-512, two tokens take four times as long as one). On others they need multiples of four
  rows (q4_0). With AMX every row gains.
"""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..base.cpu_load import is_busy
from ..base.errors import ArtefactError
from ..base.progress import PROGRESS_LOGGER
from .engine import CacheChoice
from .file_cache import cached, file_identity
from .llama_context import AttentionSettings, LlamaContext
from .pass_sizes import PassTimes
from .protocol import Chunk

PLAIN = AttentionSettings("f16", False)
FLASH = AttentionSettings("f16", True)
FLASH_Q8_0 = AttentionSettings("q8_0", True)

CANDIDATES: dict[CacheChoice, tuple[AttentionSettings, ...]] = {
    "auto": (FLASH_Q8_0, PLAIN, FLASH),
    "f16": (PLAIN, FLASH),
    "q8_0": (FLASH_Q8_0,),
    "f32": (AttentionSettings("f32", False), AttentionSettings("f32", True)),
}
"""Requested cache type -> settings to measure. Plain attention cannot read quantised values."""

PASS_SECONDS = 2.0
"""Time after which no further pass size is measured."""

EVALUATED_TOKENS = 64
"""Tokens of a test that are evaluated. The deeper cache consists of copies of them."""
DEEP_TOKENS = 512
"""Cached tokens of the deep attention tests."""
FAR_TOKENS = 1536
"""Cached tokens that the deep attention tests are extrapolated to, on the line through the time of an empty cache."""
MAX_CHATS = 8
"""Largest number of chats of an attention test."""
SUFFIX_TOKENS = 24
"""Tokens of a short prompt on a long cache, such as the next turn of a chat."""
OTHER_CHAT_TOKENS = 16
"""Cached tokens of every other chat."""
ATTENTION_REPETITIONS = 4
"""Passes per attention test. The fastest counts, because other processes may use the machine."""
ROUNDS = 2
"""Attention tests of each candidate, of which the fastest counts."""
ROUND_SECONDS = 2.0
"""Time of the first round above which there is no second one: the first answer waits for it."""
CLOSE_CANDIDATE = 1.25
"""Multiple of the best candidate's mean above which a candidate has no second round."""

PASS_DEPTH = 256
"""Cached tokens of each chat in the passes. The chats share this prefix."""
PIECE_TOKENS = 16
"""Tokens of this prefix in a pass. A request may wait for it."""
PASS_REPETITIONS = 3
"""Passes per size, of which the fastest counts."""


def choose_attention(
    path: Path,
    release: str,
    wanted: CacheChoice,
    num_sequences: int,
    make_context: Callable[[AttentionSettings, int, int], LlamaContext],
    may_measure: bool = True,
) -> AttentionSettings:
    """Return the fastest settings for the model file at `path`, as measured now or earlier on this machine.

    Without `may_measure`, and on a busy machine without an earlier result, the choice is plain attention over an f16
    cache, unless `wanted` is another type. `release` has the version, build and threads that the result depends on.
    `make_context(settings, slots, num_sequences)` makes a context of the model.
    """
    num_sequences = min(num_sequences, MAX_CHATS)
    candidates = CANDIDATES[wanted]
    unmeasured = PLAIN if PLAIN in candidates else candidates[0]
    if len(candidates) == 1 or not may_measure:
        return unmeasured

    def measure() -> str:
        if is_busy():
            text = "this machine is busy: %s starts with %s, and is timed on this CPU at a later load"
            logging.getLogger(PROGRESS_LOGGER).debug(text, path.name, unmeasured)
            return ""
        _announce(path, "attention")
        return str(fastest_attention(candidates, num_sequences, make_context))

    names = {str(candidate): candidate for candidate in candidates}
    beside = f" beside {num_sequences - 1} others" if num_sequences > 1 else ""
    key = f"attention and prompts of {', '.join(names)}{beside} on {platform.node()} ({release})"
    return names.get(cached(key, [path], measure, names.__contains__), unmeasured)


def _announce(path: Path, subject: str) -> None:
    """Report a measurement, also in a program that configures no logging."""
    text = "%s is new here: timing %s on this CPU, usually 1 to 4 s; the result is stored (--no-tune skips it)"
    logging.getLogger(PROGRESS_LOGGER).warning(text, path.name, subject)


def fastest_attention(
    candidates: Sequence[AttentionSettings],
    num_sequences: int,
    make_context: Callable[[AttentionSettings, int, int], LlamaContext],
) -> AttentionSettings:
    """Return the candidate with the least mean, over all tests, of its time relative to the best candidate's."""
    with contextlib.ExitStack() as stack:
        contexts: dict[AttentionSettings, LlamaContext] = {}
        other_slots = num_sequences * (OTHER_CHAT_TOKENS + 2 * ATTENTION_REPETITIONS)
        slots = DEEP_TOKENS + SUFFIX_TOKENS + 4 * ATTENTION_REPETITIONS + other_slots + EVALUATED_TOKENS
        for candidate in candidates:
            with contextlib.suppress(ArtefactError):  # heads without whole Q8_0 blocks
                # a second sequence in any case, see `_deepen`
                contexts[candidate] = make_context(candidate, slots, max(2, num_sequences))
                stack.callback(contexts[candidate].close)
        if not contexts:
            names = ", ".join(map(str, candidates))
            raise ArtefactError(
                f"llama.cpp makes no context of this model with any of: {names}; use another --kv-cache"
            )
        times: dict[AttentionSettings, np.ndarray] = {}  # [tests]
        # The candidates take turns, so that other load on the machine affects all of them alike.
        began = time.perf_counter()
        for _ in range(ROUNDS):
            for candidate in _close_candidates(times) or contexts:
                seconds = np.array(_attention_seconds(contexts[candidate], num_sequences))
                times[candidate] = np.minimum(seconds, times.get(candidate, seconds))
            if time.perf_counter() - began > ROUND_SECONDS:
                break
    return _close_candidates(times)[0]


def _close_candidates(times: dict[AttentionSettings, np.ndarray]) -> list[AttentionSettings]:
    """Return the candidates whose mean is near the least one, best first; a single one if no other is near."""
    if not times:
        return []
    least = np.min(list(times.values()), axis=0)
    means = {candidate: float((seconds / least).mean()) for candidate, seconds in times.items()}
    best = min(means.values())
    return sorted((each for each in means if means[each] <= CLOSE_CANDIDATE * best), key=means.__getitem__)


def _attention_seconds(context: LlamaContext, num_sequences: int) -> list[float]:
    """Return the seconds of all tests of one candidate.

    The tests are: a prompt, a token on an empty cache, on a deep one and on FAR_TOKENS, and a short suffix on a deep
    cache. With several sequences also: a token of each in one pass, and a token and a prompt of one while the others'
    past fills the cache.
    """

    def fastest(sequences: Sequence[int]) -> float:
        return min(_pass_seconds(context, sequences) for _ in range(ATTENTION_REPETITIONS))

    def far(seconds: float) -> float:
        return max(seconds, empty + (seconds - empty) * FAR_TOKENS / DEEP_TOKENS)

    for sequence in range(num_sequences):
        context.truncate(sequence, 0)
    prompt = _pass_seconds(context, [0], EVALUATED_TOKENS)
    empty = fastest([0])
    context.truncate(0, EVALUATED_TOKENS)
    _deepen(context, EVALUATED_TOKENS, DEEP_TOKENS)
    deep = fastest([0])
    suffix = _pass_seconds(context, [0], SUFFIX_TOKENS)
    seconds = [prompt, empty, deep, far(deep), suffix]
    if num_sequences > 1:
        _pass_seconds(context, [1], OTHER_CHAT_TOKENS)
        state = context.sequence_state(1)
        for sequence in range(2, num_sequences):
            context.restore_sequence(sequence, state, OTHER_CHAT_TOKENS)
        seconds.append(fastest(range(num_sequences)))
        # The kernel also reads the slots of other chats, so their past costs time.
        seconds.append(far(fastest([1])))
        seconds.append(_pass_seconds(context, [1], EVALUATED_TOKENS))
    return seconds


def _deepen(context: LlamaContext, length: int, depth: int) -> None:
    """Give sequence 0, which has `length` tokens, `depth` tokens to attend to. Sequence 1 is empty before and after.

    The new ones are copies of the others at the same positions, because their evaluation would take seconds.
    """
    if not context.cuts_sequences:  # its passes take the same time at any depth
        return
    state = context.sequence_state(0)
    for _ in range(depth // length - 1):
        if not context.restore_sequence(1, state, length):
            return
        context.copy(1, 0, length)
        context.truncate(1, 0)


class PassMeasurement:
    """Measures the passes of a model for several sequences, in one or several attempts."""

    def __init__(
        self, path: Path, release: str, make_context: Callable[[int, int], LlamaContext], num_sequences: int
    ) -> None:
        """Measure the model file at `path`. `release`: version, build, threads and attention that times depend on.

        `make_context(slots, num_sequences)` makes a context of the model.
        """
        self._path, self._make_context, self._num_sequences = path, make_context, num_sequences
        self._key = f"milliseconds of passes for {num_sequences} on {platform.node()} ({release})"
        self._identity = file_identity([path])
        self._ms, self._seconds = dict[int, float](), 0.0
        """{sequences in a pass: milliseconds}, and the time that these measurements took."""

    def stored(self) -> PassTimes | None:
        """Return the times that were measured earlier on this machine."""
        return self._find(lambda: "")

    def measure(self, should_stop: Callable[[], bool]) -> PassTimes | None:
        """Return the times, as measured now or earlier on this machine.

        They are None if the machine is busy, the file was replaced, llama.cpp makes no further context, or
        `should_stop` is true before the last pass. Another call then goes on with the sizes that are missing.
        """
        try:
            times = self._find(lambda: self._measure(should_stop))
        except ArtefactError:
            return None
        if times is not None:
            logging.getLogger(PROGRESS_LOGGER).info("%s: %s", self._path.name, times)
        return times

    def _find(self, measure: Callable[[], str]) -> PassTimes | None:
        parse = partial(PassTimes.parse, num_sequences=self._num_sequences)
        return parse(cached(self._key, [self._path], measure, lambda text: parse(text) is not None))

    def _measure(self, should_stop: Callable[[], bool]) -> str:
        """Return the times as text, "" without a result. Sizes that are not measured in time are interpolated."""
        if is_busy() or should_stop() or file_identity([self._path]) != self._identity:
            return ""
        if not self._ms:
            _announce(self._path, "several answers at once")
        number = self._num_sequences
        with contextlib.closing(self._make_context(PASS_DEPTH + PASS_REPETITIONS * number, number)) as context:
            for _ in range(EVALUATED_TOKENS // PIECE_TOKENS):
                if should_stop():
                    return ""
                context.extend([Chunk(0, [0] * PIECE_TOKENS, wants_logits=False)])
            _deepen(context, EVALUATED_TOKENS, PASS_DEPTH)
            for sequence in range(1, number):
                context.copy(0, sequence, EVALUATED_TOKENS)
            for size in _sizes_to_measure(number):
                if size in self._ms:
                    continue
                if self._ms and self._seconds > PASS_SECONDS:
                    break
                began, fastest = time.perf_counter(), math.inf
                for _ in range(PASS_REPETITIONS):
                    if should_stop():
                        return ""
                    fastest = min(fastest, _pass_ms(context, size, EVALUATED_TOKENS))
                self._ms[size] = fastest
                self._seconds += time.perf_counter() - began
        sizes, milliseconds = zip(*sorted(self._ms.items()), strict=True)
        times = np.interp(range(1, number + 1), sizes, milliseconds)
        return PassTimes(tuple(times)).to_text()


def _sizes_to_measure(num_sequences: int) -> Sequence[int]:
    """Return 1 to `num_sequences`: first the largest and 1, then multiples of the highest powers of two.

    Kernels for several rows are fast at multiples of four or eight. If the time runs out, these are measured and the
    sizes between them interpolated.
    """
    ends = (1, num_sequences)

    def order(size: int) -> tuple[bool, int, int]:
        highest_power = size & -size
        return size not in ends, -highest_power, size

    return sorted(range(1, num_sequences + 1), key=order)


def _pass_ms(context: LlamaContext, num_sequences: int, depth: int) -> float:
    """Return the milliseconds of a pass over one token of each sequence, and cut the caches back to `depth` tokens.

    A cache that cannot be cut is emptied, because its passes take the same time at any depth.
    """
    milliseconds = 1e3 * _pass_seconds(context, range(num_sequences))
    for sequence in range(num_sequences):
        context.truncate(sequence, depth if context.cuts_sequences else 0)
    return milliseconds


def _pass_seconds(context: LlamaContext, sequences: Sequence[int], num_tokens: int = 1) -> float:
    """Return the seconds of a pass that appends `num_tokens` tokens to each sequence."""
    began = time.perf_counter()
    context.extend([Chunk(sequence, [0] * num_tokens) for sequence in sequences])
    return time.perf_counter() - began
