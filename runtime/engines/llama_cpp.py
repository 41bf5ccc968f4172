"""The llama.cpp engine for any GGUF file."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..base.cpu_load import FreeCores
from ..base.errors import ArtefactError
from .engine import EngineOptions, context_length, engine_build, engine_version
from .llama_context import LlamaContext, embed
from .llama_library import load_llama
from .manifest import Manifest
from .memory import huge_pages, trim_heap
from .pass_sizes import PassTimes
from .protocol import EngineTraits, Pooling
from .speculation import Speculation
from .tuning import PassMeasurement, choose_attention

MAX_ROWS = 64
"""Tokens per pass if the logits of every token are wanted."""

SHARED_CONTEXTS = 2
"""Number of whole context windows that the caches of several chats share by default."""

MIN_CROWDED_SLOTS = 1024
"""Least number of cached tokens that count as a crowd. In small models other costs than attention decide."""

_LOAD_MODE_NONE, _LOAD_MODE_MMAP = 0, 1
"""enum llama_load_mode"""

_CONTROL_OR_UNKNOWN = 1 << 3 | 1 << 0
"""Bits of enum llama_token_attr"""

_DROP_LOG_LINE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value or 0
)
"""Keep llama.cpp's log off stderr by a C function that ignores its arguments. Failures are raised as errors.

A signal that arrives in a function of Python that C calls would be lost, because its exception has nowhere to go.
"""


class LlamaCppEngine:
    """A GGUF model, see `runtime.engines.protocol.Engine`."""

    _passes: PassMeasurement | None = None
    """None if there is nothing to measure."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        self._llama: Any = load_llama()
        self._llama.llama_log_set(_DROP_LOG_LINE, ctypes.c_void_p(0))
        # it measures while the model is loaded
        free_cores = None if options.threads else FreeCores.where_known(os.cpu_count() or 1)
        began = time.perf_counter()
        with huge_pages(options.huge_pages):
            self._model = _load(path, options.memory_map)
        self.load_ms = (time.perf_counter() - began) * 1e3
        try:
            self._make_context(path, options)
        except BaseException:
            self._llama.llama_model_free(self._model)
            raise
        self._context.free_cores = free_cores
        self._vocab: Any = self._llama.llama_model_get_vocab(self._model)
        self._read_vocabulary()

    def _make_context(self, path: Path, options: EngineOptions) -> None:
        """Choose the attention and create the caches."""
        threads = options.threads or os.cpu_count() or 1
        self.context_length = context_length(options.context, self._llama.llama_model_n_ctx_train(self._model))
        self.num_sequences = options.sequences
        make = partial(LlamaContext, self._model, threads)
        # A build for other instruction sets needs its own measurement, although it is the same release.
        build = hashlib.sha256(engine_build("llama.cpp").encode()).hexdigest()[:8]
        version = f"{engine_version('llama.cpp')}, build {build}"
        release = f"{version}, {threads} threads"
        attention = choose_attention(path, release, options.kv_cache, self.num_sequences, make, options.tune)
        heads, head_dim = _cache_shape(path.parent, self._metadata)
        bytes_per_token = attention.bytes_per_token(heads, head_dim)
        slots = self.context_length * min(self.num_sequences, SHARED_CONTEXTS)
        # never less than a whole window: a single chat must be able to use the context that was asked for
        if options.cache_memory and bytes_per_token:
            slots = max(self.context_length, int(options.cache_memory / bytes_per_token))
        began = time.perf_counter()  # the measurement is not part of load_ms, because it runs only once
        with huge_pages(options.huge_pages):
            self._context = make(attention, slots, self.num_sequences, grows=True)
        self.load_ms += (time.perf_counter() - began) * 1e3
        self.state_format = f"{version}, {attention}"
        context = self._context
        self.cache_slots, self.max_batch = context.slots, context.max_batch
        self.extend, self.truncate, self.copy = context.extend, context.truncate, context.copy
        self.interrupt, self.resume = context.interrupt, context.resume
        self.sequence_state, self.restore_sequence = context.sequence_state, context.restore_sequence
        self.traits = EngineTraits(self._context.cuts_sequences, max_rows=MAX_ROWS, settings=str(attention))
        if self.traits.cuts_sequences:
            self.traits.crowded_slots = max(MIN_CROWDED_SLOTS, self._crowded_slots())
            # only here: wrong proposals must be removed from the cache again
            self.traits.speculation = Speculation() if options.lookup else None
        if self.num_sequences > 1 and options.tune:
            make_another = partial(make, attention)
            self._passes = PassMeasurement(path, f"{release}, {attention}", make_another, self.num_sequences)
            self._use_times(self._passes.stored())
        self.kv_cache_bytes = round(self.cache_slots * bytes_per_token)

    def measure_passes(self, should_stop: Callable[[], bool]) -> None:
        """Set the times of passes, see `PassTimer`."""
        if self._passes is not None:
            self._use_times(self._passes.measure(should_stop))
            trim_heap()

    def _use_times(self, times: PassTimes | None) -> None:
        if times is not None:
            self.traits.pass_times = times
            self.traits.settings += f"; {times}"
            if self.traits.speculation is not None:
                self.traits.speculation.add_times(times)

    def _crowded_slots(self) -> int:
        """Return the number of cached tokens at which attention to them takes half the products of the weights.

        llama.cpp computes the attention of a token over the slots of all sequences.
        """
        model = self._model
        products_per_slot = 2 * self._llama.llama_model_n_layer(model) * self._llama.llama_model_n_embd(model)
        return self._llama.llama_model_n_params(model) // (2 * products_per_slot)

    def _read_vocabulary(self) -> None:
        llama, vocab = self._llama, self._vocab
        self.vocab_size = llama.llama_vocab_n_tokens(vocab)
        self.end_ids = frozenset(token for token in range(self.vocab_size) if llama.llama_vocab_is_eog(vocab, token))
        template = llama.llama_model_chat_template(self._model, None)
        self.chat_template = template.decode("utf-8", "replace") if template else None
        self.bos_token = self._text_of(llama.llama_vocab_bos(vocab))
        self.eos_token = self._text_of(llama.llama_vocab_eos(vocab))
        self.adds_bos = bool(llama.llama_vocab_get_add_bos(vocab))
        tokens = range(self.vocab_size)
        control_tokens = [token for token in tokens if llama.llama_vocab_get_attr(vocab, token) & _CONTROL_OR_UNKNOWN]
        self.control_texts = frozenset(map(self._text_of, control_tokens)) - {""}

    def _metadata(self, key: str) -> str:
        """Return a value of the file's header as text, "" if it is absent or a list."""
        value = ctypes.create_string_buffer(256)
        size = self._llama.llama_model_meta_val_str(self._model, key.encode(), value, len(value))
        return value.value.decode("utf-8", "replace") if size >= 0 else ""

    def _text_of(self, token: int) -> str:
        return "" if token < 0 else self._piece(token, special=True).decode("utf-8", "replace")

    def tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        capacity = len(data) + 1  # a token is at least a byte, unless the tokenizer adds some
        while True:
            tokens = (self._llama.llama_token * capacity)()
            size = self._llama.llama_tokenize(self._vocab, data, len(data), tokens, capacity, False, special)
            if size >= 0:
                return tokens[:size]
            capacity = -size

    def token_bytes(self, token: int) -> bytes:
        return self._piece(token, special=False)

    def _piece(self, token: int, special: bool) -> bytes:
        capacity = 256
        while True:
            piece = ctypes.create_string_buffer(capacity)  # not shared, because servers call this from several threads
            size = self._llama.llama_token_to_piece(self._vocab, token, piece, capacity, 0, special)
            if size >= 0:
                return piece.raw[:size]
            capacity = -size

    def embed(self, tokens: Sequence[int], pooling: Pooling) -> np.ndarray:
        return embed(self._model, self._context.threads, tokens, pooling)

    def close(self) -> None:
        self._context.close()
        self._llama.llama_model_free(self._model)
        trim_heap()


def _load(path: Path, memory_map: bool) -> Any:
    """Load the file at `path` and return its llama_model pointer."""
    llama = load_llama()
    parameters = llama.llama_model_default_params()
    parameters.load_mode = _LOAD_MODE_MMAP if memory_map else _LOAD_MODE_NONE
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise ArtefactError(
            f"{path} is damaged or of an architecture that this llama.cpp does not know; export it again"
        )
    return model


def _cache_shape(folder: Path, metadata: Callable[[str], str]) -> tuple[Sequence[int], int]:
    """Return the key/value heads of every layer and their width, ([], 0) if neither manifest nor header has them."""
    # the manifest first: the header of an irregular model has lists, which the C functions cannot read
    with contextlib.suppress(ArtefactError):
        architecture = Manifest.read(folder).architecture
        return architecture.get("num_key_value_heads", ()), architecture.get("head_dim", 0)
    name = metadata("general.architecture")
    try:
        layers, heads = (int(metadata(f"{name}.{key}")) for key in ("block_count", "attention.head_count"))
        groups = int(metadata(f"{name}.attention.head_count_kv") or heads)
        if not heads:  # a recurrent model, whose state does not grow with the tokens
            return [], 0
        key_length = metadata(f"{name}.attention.key_length")
        width = int(key_length) if key_length else int(metadata(f"{name}.embedding_length")) // heads
    except ValueError:
        return [], 0
    return [groups] * layers, width
