"""A llama.cpp context: the KV caches of several sequences, passes over tokens of all of them, and embeddings."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..base.cpu_load import FreeCores
from ..base.errors import ArtefactError, EfficientLLMError
from .llama_library import load_llama
from .memory import trim_heap
from .protocol import CacheFullError, Chunk, EvaluationInterrupted, Pooling


class TorchFreeThread:
    """A thread for the computations of one context that torch never enters.

    On a CPU with AMX, llama.cpp and torch both use tile registers, which belong to a thread. llama.cpp configures them
    once per thread. torch (oneDNN) configures them for each of its bf16 products and does not restore them. If a thread
    switches from llama.cpp to torch and back, the next product of quantised weights is an illegal instruction, which
    ends the process. Without torch, as in the server, llama.cpp computes in the caller's thread.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def run(self, compute: Callable[..., int], *arguments: Any) -> int:
        """Return compute(*arguments)."""
        if "torch" not in sys.modules:
            return compute(*arguments)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "llama.cpp")
        return self._thread.submit(compute, *arguments).result()

    def close(self) -> None:
        """End the thread, if it was started."""
        if self._thread is not None:
            self._thread.shutdown()


CacheType = Literal["f16", "q8_0", "f32"]

MAX_PASS_TOKENS = 512
"""Largest number of tokens of one pass."""

FIRST_SLOTS = MAX_PASS_TOKENS
"""Slots that a growing cache starts with. Each takes memory from then on, because llama.cpp writes zeros into it."""

SLOT_MULTIPLE = 256
"""llama.cpp rounds the slots of a cache up to a multiple of it, but not the size of its passes."""

EMBEDDING_PASS_TOKENS = 64
"""Tokens per pass of `embed`, small because llama.cpp also keeps the logits of all of them."""

_ENABLED, _DISABLED = 1, 0
"""enum llama_flash_attn_type"""

_POOLING_TYPE_NONE = 0
"""enum llama_pooling_type"""

_GGML_TYPES: dict[CacheType, int] = {"f32": 0, "f16": 1, "q8_0": 8}
"""enum ggml_type"""

_NO_SLOTS, _ABORTED = 1, 2
"""Results of llama_decode, see llama.h: no slots for the tokens, and aborted by the callback."""

ELEMENT_BYTES: dict[CacheType, float] = {"f32": 4, "f16": 2, "q8_0": 34 / 32}


@dataclass(frozen=True)
class AttentionSettings:
    """Cache type and attention kernel of a llama.cpp context."""

    cache: CacheType
    flash: bool
    """Use the flash attention kernel, the only one for quantised values. Without it llama.cpp pads the values of every
    layer to the width of the widest one."""

    def __str__(self) -> str:
        return f"{self.cache} cache, {'with' if self.flash else 'without'} flash attention"

    def bytes_per_token(self, heads: Sequence[int], head_dim: int) -> float:
        """Return the bytes of one token's keys and values. `heads`: key/value heads of each layer."""
        values = sum(heads) if self.flash else len(heads) * max(heads, default=0)
        return ELEMENT_BYTES[self.cache] * head_dim * (sum(heads) + values)


class LlamaContext:
    """Several sequences of tokens whose caches share a number of slots, one per token."""

    def __init__(
        self,
        model: Any,
        threads: int,
        attention: AttentionSettings,
        slots: int,
        num_sequences: int,
        *,
        grows: bool = False,
    ) -> None:
        """Create a context of `model`, a llama_model pointer that must outlive it.

        If it `grows`, its cache begins with FIRST_SLOTS and is made larger when tokens need it.
        """
        llama = load_llama()
        self._llama, self._model, self._attention = llama, model, attention
        self.threads = threads
        """Threads of a pass."""
        self.free_cores: FreeCores | None = None
        """If set, it decides on `threads` before each pass."""
        self.slots = -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE
        """Tokens that the caches of all sequences hold together, once they have grown."""
        self.max_batch = min(MAX_PASS_TOKENS, self.slots)
        """Largest number of tokens of one pass. More would end the process."""
        self.cuts_sequences = not (llama.llama_model_is_recurrent(model) or llama.llama_model_is_hybrid(model))
        """False if the state of a sequence holds all of its tokens, as in Mamba, so that none can be removed."""
        self.vocab_size: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._lengths = [0] * num_sequences
        self._thread = TorchFreeThread()
        # llama.cpp calls the callback between two operations of a pass and aborts if the result is not 0. The callback
        # is C's strlen on this text, because a Python function would wait for the GIL.
        self._abort_text = ctypes.create_string_buffer(2)
        library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        self._abort_callback = llama.ggml_abort_callback(ctypes.cast(library.strlen, ctypes.c_void_p).value)
        self._open(min(FIRST_SLOTS, self.slots) if grows and self.cuts_sequences else self.slots)
        self._batch = llama.llama_batch_init(MAX_PASS_TOKENS, 0, 1)

    def _open(self, slots: int) -> None:
        """Make the llama.cpp context, whose caches hold `slots` tokens. Raise ArtefactError if that fails."""
        llama, attention = self._llama, self._attention
        parameters = llama.llama_context_default_params()
        # not unified, each sequence would have a fixed share of the slots, and a copy of a prefix would take new ones
        parameters.n_ctx, parameters.n_seq_max, parameters.kv_unified = slots, len(self._lengths), True
        parameters.n_batch = parameters.n_ubatch = self.max_batch
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.type_k = parameters.type_v = _GGML_TYPES[attention.cache]
        parameters.flash_attn_type = _ENABLED if attention.flash else _DISABLED
        self._opened, self._memory = llama.llama_init_from_model(self._model, parameters), None
        if not self._opened:
            raise ArtefactError(f"llama.cpp makes no context of {slots} tokens with {attention}; set --kv-cache")
        self._memory = llama.llama_get_memory(self._context)
        self._open_slots: int = llama.llama_n_ctx(self._context)
        address = ctypes.cast(self._abort_text, ctypes.c_void_p)
        llama.llama_set_abort_callback(self._context, self._abort_callback, address)

    @property
    def _context(self) -> Any:
        if not self._opened:  # without it, llama.cpp's functions of the memory do nothing, and others end the process
            raise ArtefactError("the cache of this model was lost for want of memory; make room and load it again")
        return self._opened

    def _grow(self) -> None:
        """Double the slots. Raise CacheFullError, with the same slots and tokens, if that is not possible."""
        llama, old, new = self._llama, self._open_slots, min(2 * self._open_slots, self.slots)
        if new == old:
            raise CacheFullError("the caches of this model are full; load it with a larger --cache-memory")
        no_memory = f"there is no memory for a cache of {new:,} tokens; make room, or shorten the text"
        try:
            state = _own_pages(llama.llama_state_get_size(self._context))
        except OSError as error:
            raise CacheFullError(no_memory) from error
        written = llama.llama_state_get_data(self._context, state, len(state))
        llama.llama_free(self._context)  # before, so that not both caches take memory
        trim_heap()
        try:
            self._open(new)
        except ArtefactError:
            self._open(old)
        if llama.llama_state_set_data(self._context, state, written) != written:
            raise ArtefactError("llama.cpp cannot read its own cache; load the model again")
        if self._open_slots == old:
            raise CacheFullError(no_memory)

    def interrupt(self) -> None:
        """End the pass in progress with EvaluationInterrupted, and every later one until `resume`."""
        # a pass of a recurrent model ends as planned, because its state could not be restored
        if self.cuts_sequences:
            self._abort_text[0] = b"!"

    def resume(self) -> None:
        """Undo `interrupt`."""
        self._abort_text[0] = b"\0"

    def extend(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """Append tokens to sequences, see `Engine.extend`."""
        num_rows, wanted = 0, list[range]()
        for chunk in chunks:
            begin = self._lengths[chunk.sequence]
            first_wanted = len(chunk.tokens) - (1 + chunk.num_drafted if chunk.wants_logits else 0)
            for index, token in enumerate(chunk.tokens):
                row, is_wanted = num_rows + index, index >= first_wanted
                _fill_row(self._batch, row, token, begin + index, chunk.sequence, is_wanted)
            if chunk.wants_logits:
                wanted.append(range(num_rows + first_wanted, num_rows + len(chunk.tokens)))
            num_rows += len(chunk.tokens)
        self._batch.n_tokens = num_rows
        if self.free_cores is not None and self.free_cores.update() != self.threads:
            self.threads = self.free_cores.count
            self._llama.llama_set_n_threads(self._context, self.threads, self.threads)
        while status := self._thread.run(self._llama.llama_decode, self._context, self._batch):
            # llama.cpp keeps the tokens that it evaluated before an abort, and `extend` must change all or nothing
            for chunk in chunks:
                self.truncate(chunk.sequence, self._lengths[chunk.sequence])
            if status != _NO_SLOTS:
                raise EvaluationInterrupted if status == _ABORTED else RuntimeError(f"llama_decode: {status}")
            self._grow()
        for chunk in chunks:
            self._lengths[chunk.sequence] += len(chunk.tokens)
        return [np.stack(list(map(self._logits, rows))) if len(rows) > 1 else self._logits(rows[0]) for rows in wanted]

    def _logits(self, row: int) -> np.ndarray:
        # a copy: the next pass writes into the same memory
        pointer = self._llama.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).astype(np.float32, copy=True)

    def truncate(self, sequence: int, length: int) -> None:
        """Remove all but the first `length` tokens of `sequence`, or none if its state cannot be cut."""
        if self._llama.llama_memory_seq_rm(self._memory, sequence, length, -1):
            self._lengths[sequence] = min(length, self._lengths[sequence])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of `source` into the empty sequence `target`, without taking more slots."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, 0, length)
        self._lengths[target] = length

    def sequence_state(self, sequence: int) -> memoryview:
        """Return the state of a sequence, see `StateKeeper`."""
        size = self._llama.llama_state_seq_get_size(self._context, sequence)
        buffer = _own_pages(size)
        written = self._llama.llama_state_seq_get_data(self._context, buffer, size, sequence)
        return memoryview(buffer).cast("B")[:written]

    def restore_sequence(self, sequence: int, state: memoryview, length: int) -> bool:
        """Fill an empty sequence with a state, see `StateKeeper`."""
        buffer, is_good = (ctypes.c_ubyte * len(state)).from_buffer(state), False
        while True:
            read = self._llama.llama_state_seq_set_data(self._context, buffer, len(state), sequence)
            last = self._llama.llama_memory_seq_pos_max(self._memory, sequence)
            if read == len(state) and last == length - 1:
                self._lengths[sequence] = length
                return True
            # a state that is read in part would answer a prompt from positions that have no values
            self._llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            if self._open_slots >= self.slots:
                return False
            try:
                is_good = is_good or self._can_read(state, length)
                if not is_good:
                    return False
                self._grow()
            except EfficientLLMError:
                return False

    def _can_read(self, state: memoryview, length: int) -> bool:
        """Tell whether a context of its own reads a state: a bad one must not make the cache grow."""
        with contextlib.closing(LlamaContext(self._model, self.threads, self._attention, length, 1)) as other:
            return other.restore_sequence(0, state, length)

    def close(self) -> None:
        """Free the context and its caches."""
        self._thread.close()
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._opened)


def embed(model: Any, threads: int, tokens: Sequence[int], pooling: Pooling) -> np.ndarray:
    """Return the mean of the last layer's states of `tokens`, or the last token's, fp32 [H] of unit length.

    `model` is a llama_model pointer.
    """
    llama = load_llama()
    # in a context of its own, so that no cache of a chat changes
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = len(tokens)
    parameters.n_batch = parameters.n_ubatch = EMBEDDING_PASS_TOKENS
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.embeddings, parameters.pooling_type = True, _POOLING_TYPE_NONE
    context = llama.llama_init_from_model(model, parameters)
    if not context:
        raise ArtefactError(f"llama.cpp makes no context of {len(tokens)} tokens; shorten the text")
    batch = llama.llama_batch_init(EMBEDDING_PASS_TOKENS, 0, 1)
    thread = TorchFreeThread()
    hidden_size = llama.llama_model_n_embd(model)
    total = np.zeros(hidden_size, dtype=np.float64)
    try:
        for start in range(0, len(tokens), EMBEDDING_PASS_TOKENS):
            part = tokens[start : start + EMBEDDING_PASS_TOKENS]
            for row, token in enumerate(part):
                _fill_row(batch, row, token, start + row, sequence=0, wants_logits=True)
            batch.n_tokens = len(part)
            if status := thread.run(llama.llama_decode, context, batch):
                raise ArtefactError(f"llama.cpp cannot evaluate the text (status {status}); shorten it")
            pointers = [llama.llama_get_embeddings_ith(context, row) for row in range(len(part))]
            rows = [np.ctypeslib.as_array(pointer, shape=(hidden_size,)) for pointer in pointers]
            states = np.stack(rows).astype(np.float64)
            total = states[-1] if pooling == "last" else total + states.sum(axis=0)
    finally:
        thread.close()
        llama.llama_batch_free(batch)
        llama.llama_free(context)
    # the length of the mean does not matter: only the direction is returned
    length = max(float(np.linalg.norm(total)), 1e-12)
    return (total / length).astype(np.float32)


def _own_pages(size: int) -> Any:
    """Return a ctypes array of `size` bytes in pages of its own, which go back to the system with it.

    Between smaller blocks of the heap, they would stay.
    """
    return (ctypes.c_ubyte * size).from_buffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY))


def _fill_row(batch: Any, row: int, token: int, position: int, sequence: int, wants_logits: bool) -> None:
    """Set one token of a llama_batch. In a context for embeddings, `wants_logits` asks for its state."""
    batch.token[row], batch.pos[row] = token, position
    batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
    batch.logits[row] = wants_logits
