"""What a model that llama.cpp has loaded makes of a text inside: the states after its last layer, as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..base.errors import ArtefactError
from .own_thread import OwnThread
from .protocol import Pooling

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
