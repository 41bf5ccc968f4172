"""A llama.cpp context: the caches of several sequences, and evaluating tokens of all of them in one pass.

A thread of llama.cpp's own, where torch shares the process.

On a CPU with AMX both compute in tile registers, which belong to a thread. llama.cpp sets them up once for each thread;
torch (oneDNN) sets them up anew for its products in bf16 and leaves them so. In a thread that went from one to the
other and back, llama.cpp's next product of quantised weights is an illegal instruction: the process ends. So where
torch is loaded, llama.cpp computes in a thread that torch never enters; elsewhere, as in the server, in the caller's.

What a model that llama.cpp has loaded makes of a text inside: the states after its last layer, as one vector.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..base.errors import ArtefactError
from .protocol import CacheFullError, EvaluationInterrupted, Part, Pooling


class OwnThread:
    """Runs the computations of one context."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def run(self, compute: Callable[..., int], *arguments: Any) -> int:
        """compute(*arguments), in whichever thread is safe."""
        if "torch" not in sys.modules:
            return compute(*arguments)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "llama.cpp")
        return self._thread.submit(compute, *arguments).result()

    def close(self) -> None:
        """End the thread, if there is one."""
        if self._thread is not None:
            self._thread.shutdown()


CacheType = Literal["f16", "q8_0", "f32"]

BATCH = 512
"""Tokens evaluated in one pass, at most."""

CELLS = 256
"""llama.cpp rounds a cache up to a multiple of it, but not, unasked, the size of its passes with it."""

_ENABLED, _DISABLED = 1, 0
"""enum llama_flash_attn_type"""

_TYPES: dict[CacheType, int] = {"f32": 0, "f16": 1, "q8_0": 8}
"""enum ggml_type"""

ELEMENT_BYTES: dict[CacheType, float] = {"f32": 4, "f16": 2, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Attention:
    """How llama.cpp attends, and what it keeps of the past."""

    cache: CacheType
    flash: bool
    """Its flash attention kernel, which alone reads quantized values; without it llama.cpp pads the values of every
    layer to the widest layer's."""

    def __str__(self) -> str:
        return f"{self.cache} cache, {'with' if self.flash else 'without'} flash attention"

    def bytes_per_token(self, heads: Sequence[int], head_dim: int) -> float:
        """Keys and values of one token; `heads` are the key/value heads of each layer."""
        values = sum(heads) if self.flash else len(heads) * max(heads, default=0)
        return ELEMENT_BYTES[self.cache] * head_dim * (sum(heads) + values)


class LlamaContext:
    """`sequences` of tokens whose caches share `slots` tokens of room."""

    def __init__(self, model: Any, threads: int, attention: Attention, slots: int, sequences: int) -> None:
        """`model`: a llama_model pointer, which must outlive the context."""
        import llama_cpp

        self._llama: Any = llama_cpp
        llama: Any = llama_cpp
        parameters = llama_cpp.llama_context_default_params()
        slots = -(-slots // CELLS) * CELLS
        parameters.n_ctx, parameters.n_seq_max, parameters.kv_unified = slots, sequences, True
        self.max_batch = min(BATCH, slots)
        """Tokens that one pass takes; more would end the process."""
        parameters.n_batch = parameters.n_ubatch = self.max_batch
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = _TYPES[attention.cache]
        parameters.flash_attn_type = _ENABLED if attention.flash else _DISABLED
        self._context: Any = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            raise ArtefactError(f"llama.cpp makes no context of {slots} tokens with {attention}")
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self.slots: int = llama_cpp.llama_n_ctx(self._context)
        """Tokens that fit, all sequences together."""
        self.vocab_size: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch: Any = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._lengths = [0] * sequences
        self._thread = OwnThread()
        # asked between two operations of a pass, with the address of this text: whether it is longer than nothing.
        # C's own strlen needs no Python, which another thread may be holding up
        self._stop_wish = ctypes.create_string_buffer(2)
        library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        self._is_stop_wished: Any = llama.ggml_abort_callback(ctypes.cast(library.strlen, ctypes.c_void_p).value)
        llama_cpp.llama_set_abort_callback(
            self._context, self._is_stop_wished, ctypes.cast(self._stop_wish, ctypes.c_void_p)
        )

    def interrupt(self) -> None:
        """End the pass in progress in EvaluationInterrupted, and every later one until `resume`; from any thread."""
        self._stop_wish[0] = b"!"

    def resume(self) -> None:
        """Take back what `interrupt` said."""
        self._stop_wish[0] = b"\0"

    def extend(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """See Engine.extend."""
        rows = self._decode([(part.sequence, part.tokens, [part.wants_logits]) for part in parts])
        return [self._logits(row) for row in rows]

    def all_logits(self, sequence: int, tokens: Sequence[int]) -> np.ndarray:
        """Append `tokens`, `max_batch` at most, and return the logits after each, fp32 [n, V]."""
        rows = self._decode([(sequence, tokens, [True] * len(tokens))])
        return np.stack([self._logits(row) for row in rows])

    def _decode(self, parts: Sequence[tuple[int, Sequence[int], Sequence[bool]]]) -> list[int]:
        """Evaluate parts (sequence, tokens, whether logits are wanted of the last ones); rows of those that are."""
        batch, count, rows = self._batch, 0, []
        for sequence, tokens, wanted in parts:
            position, first_wanted = self._lengths[sequence], len(tokens) - len(wanted)
            for index, token in enumerate(tokens):
                batch.token[count], batch.pos[count] = token, position + index
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                wants = index >= first_wanted and wanted[index - first_wanted]
                batch.logits[count] = wants
                if wants:
                    rows.append(count)
                count += 1
        batch.n_tokens = count
        status = self._thread.run(self._llama.llama_decode, self._context, batch)
        if status:
            for sequence, _, _ in parts:
                self.truncate(sequence, self._lengths[sequence])
            raise {1: CacheFullError, 2: EvaluationInterrupted}.get(status, RuntimeError)(f"llama_decode: {status}")
        for sequence, tokens, _ in parts:
            self._lengths[sequence] += len(tokens)
        return rows

    def _logits(self, row: int) -> np.ndarray:
        pointer = self._llama.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).astype(np.float32, copy=True)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget what `sequence` holds beyond its first `length` tokens."""
        self._llama.llama_memory_seq_rm(self._memory, sequence, length, -1)
        self._lengths[sequence] = min(length, self._lengths[sequence])

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target`, which is empty, begin with the first `length` tokens of `source`; they take no further room."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, 0, length)
        self._lengths[target] = length

    def close(self) -> None:
        """Free the caches."""
        self._thread.close()
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)


CHUNK = 64
"""Tokens evaluated in one pass: llama.cpp keeps the logits of all of them, too."""


def embed(model: Any, threads: int, tokens: Sequence[int], pooling: Pooling) -> np.ndarray:
    """fp32 [H] of unit length: the mean of the states of `tokens`, or the last one's.

    `model` is a llama_model pointer; a context of its own is made, so that no chat's cache is touched. H is the hidden
    size.
    """
    import llama_cpp

    llama: Any = llama_cpp
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = len(tokens), CHUNK, CHUNK
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.embeddings, parameters.pooling_type = True, llama.LLAMA_POOLING_TYPE_NONE
    context = llama.llama_init_from_model(model, parameters)
    if not context:
        raise ArtefactError(f"llama.cpp makes no context of {len(tokens)} tokens")
    batch, size = llama.llama_batch_init(CHUNK, 0, 1), llama.llama_model_n_embd(model)
    thread = OwnThread()
    total = np.zeros(size, dtype=np.float64)
    try:
        for start in range(0, len(tokens), CHUNK):
            _fill(batch, tokens[start : start + CHUNK], start)
            if status := thread.run(llama.llama_decode, context, batch):
                raise ArtefactError(f"llama.cpp cannot evaluate the text (status {status})")
            states = _states(llama, context, batch.n_tokens, size)
            total = states[-1] if pooling == "last" else total + states.sum(axis=0)
    finally:
        thread.close()
        llama.llama_batch_free(batch)
        llama.llama_free(context)
    return (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)


def _fill(batch: Any, tokens: Sequence[int], start: int) -> None:
    """Make `tokens`, which stand at `start` of the text, the batch's."""
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index] = token, start + index
        batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1


def _states(llama: Any, context: Any, count: int, size: int) -> np.ndarray:
    """fp64 [count, H]"""
    rows = [llama.llama_get_embeddings_ith(context, index) for index in range(count)]
    return np.stack([np.ctypeslib.as_array(row, shape=(size,)).astype(np.float64) for row in rows])
