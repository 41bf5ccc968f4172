"""The llama.cpp engine: any GGUF, through llama-cpp-python."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import ArtefactError
from ..base.extras import extra
from .engine import DEFAULT_CONTEXT, EngineOptions
from .huge_pages import huge_pages
from .manifest import cache_bytes, manifest_cache_bytes
from .memory import give_back_freed_memory
from .prefix import check_room, reusable_prefix

BATCH = 512
"""Tokens evaluated in one pass of a prefill."""
EVALUATED = 64
"""Tokens evaluated in one pass when every token's logits are wanted."""


_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@_LOG_CALLBACK
def _drop_log_line(level: int, text: bytes, data: object) -> None:
    """Keep llama.cpp off stderr; what matters is raised."""


class LlamaCppEngine:
    """See runtime.engines.engine.Engine."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        with extra("gguf", "llama-cpp-python"):
            import llama_cpp
        check_gguf(path)
        llama_cpp.llama_log_set(_drop_log_line, ctypes.c_void_p(0))
        threads = options.threads or os.cpu_count() or 1
        began = time.perf_counter()
        self.context_length = options.context or self._default_context(path)
        try:
            with huge_pages(options.huge_pages):
                self._model = llama_cpp.Llama(
                    str(path),
                    n_ctx=self.context_length,
                    n_batch=BATCH,
                    n_threads=threads,
                    n_threads_batch=threads,
                    use_mmap=options.memory_map,
                    flash_attn=True,  # without it llama.cpp pads every layer's V cache to the widest layer's
                    verbose=False,
                )
        except ValueError as error:
            raise ArtefactError(f"{path}: llama.cpp cannot load it: {error}") from error
        self.load_ms = (time.perf_counter() - began) * 1e3
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model.model)
        self._token_to_piece = llama_cpp.llama_token_to_piece
        is_end = llama_cpp.llama_vocab_is_eog
        self.vocab_size = self._model.n_vocab()
        self.end_ids = frozenset(token for token in range(self.vocab_size) if is_end(self._vocab, token))
        self.chat_template = self._model.metadata.get("tokenizer.chat_template")
        self.bos_token = self._text_of(self._model.token_bos())
        self.eos_token = self._text_of(self._model.token_eos())
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))
        slots = self._model.n_ctx()
        # fp16; the metadata that the bindings show lacks the lists of irregular models
        self.kv_cache_bytes = manifest_cache_bytes(path.parent, slots, 2) or _metadata_cache_bytes(
            self._model.metadata, slots
        )

    @staticmethod
    def _default_context(path: Path) -> int:
        """The context the model was trained with, at most DEFAULT_CONTEXT; only header and vocabulary are read."""
        import llama_cpp

        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if model is None:
            raise ArtefactError(f"{path} is damaged or of an architecture that this llama.cpp does not know")
        value = ctypes.create_string_buffer(32)
        name = ctypes.create_string_buffer(64)
        lengths = [DEFAULT_CONTEXT]
        for index in range(llama_cpp.llama_model_meta_count(model)):
            llama_cpp.llama_model_meta_key_by_index(model, index, name, len(name))
            if name.value.endswith(b".context_length"):
                llama_cpp.llama_model_meta_val_str_by_index(model, index, value, len(value))
                lengths.append(int(value.value))
        llama_cpp.llama_model_free(model)
        return min(lengths)

    def _text_of(self, token: int) -> str:
        return "" if token < 0 else self._model.detokenize([token], special=True).decode("utf-8", "replace")

    def tokenize(self, text: str, special: bool) -> list[int]:
        return self._model.tokenize(text.encode("utf-8", "replace"), add_bos=False, special=special)

    def token_bytes(self, token: int) -> bytes:
        piece = ctypes.create_string_buffer(256)  # of its own: servers call this from several threads
        size = self._token_to_piece(self._vocab, token, piece, len(piece), 0, False)
        return piece.raw[: max(size, 0)]

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        cached = self._model.input_ids[: self._model.n_tokens].tolist()
        common = reusable_prefix(cached, tokens, self.context_length)
        self._model.n_tokens = common
        self._model.eval(list(tokens[common:]))
        return self._last_logits()

    def decode(self, token: int) -> np.ndarray:
        check_room(self._model.n_tokens, self.context_length)
        self._model.eval([token])
        return self._last_logits()

    def evaluate(self, tokens: Sequence[int], first: int) -> Iterator[np.ndarray]:
        if first:
            self.prefill(tokens[:first])
        else:
            self._model.n_tokens = 0
        check_room(len(tokens) - 1, self.context_length)
        self._model._ctx.kv_cache_seq_rm(-1, self._model.n_tokens, -1)
        for start in range(first, len(tokens), EVALUATED):
            chunk = list(tokens[start : start + EVALUATED])
            self._model._batch.set_batch(batch=chunk, n_past=start, logits_all=True)
            self._model._ctx.decode(self._model._batch)
            self._model.input_ids[start : start + len(chunk)] = chunk
            self._model.n_tokens = start + len(chunk)
            pointer = self._model._ctx.get_logits()
            yield np.ctypeslib.as_array(pointer, shape=(len(chunk), self.vocab_size)).astype(np.float32, copy=True)

    def _last_logits(self) -> np.ndarray:
        pointer = self._model._ctx.get_logits_ith(-1)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).astype(np.float32, copy=True)

    def close(self) -> None:
        self._model.close()
        give_back_freed_memory()


def _metadata_cache_bytes(metadata: dict[str, str], slots: int) -> int:
    """fp16 keys and values of uniform layers; 0 where the metadata does not describe them."""
    name = metadata.get("general.architecture", "")
    try:
        layers, heads = (int(metadata[f"{name}.{key}"]) for key in ("block_count", "attention.head_count"))
        groups = int(metadata.get(f"{name}.attention.head_count_kv", heads))
        width = int(metadata.get(f"{name}.attention.key_length", int(metadata[f"{name}.embedding_length"]) // heads))
    except (KeyError, ValueError):
        return 0
    return cache_bytes(slots, layers * groups, width, 2)


def check_gguf(path: Path) -> None:
    """ArtefactError unless `path` begins like a GGUF file; llama.cpp itself only says 'failed to load'."""
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error
    if magic != b"GGUF":
        raise ArtefactError(f"{path} is not a GGUF file")
