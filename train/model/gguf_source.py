"""What transformers drops when it reads a GGUF file as a source: the pre-tokenizer, and that its head is its embedding.

transformers 5.24 gives every byte-level BPE of a Llama-architecture GGUF GPT-2's splitting; the file names another one.
Some writers store a tied table twice, in two types: read as they are, these are two tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...runtime.base.extras import extra
from .pre_tokenizer import build_pre_tokenizer

SAME_TABLE = 0.3
"""Relative difference of embedding and head below which they are one table, rounded twice: 4 bits put them about 0.1
apart, separate training above 1."""


def restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Give a tokenizer read from a GGUF file the pre-tokenizer that the file names; unknown names change nothing."""
    with extra("train"):
        from gguf import GGUFReader
    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    pre_tokenizer = build_pre_tokenizer(field.contents()) if field is not None else None
    if pre_tokenizer is not None:
        backend: Any = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizer


def tie_what_is_stored_twice(model: Any, path: Path) -> None:
    """Tie embedding and head of a model read from a GGUF file that holds one table twice, in two roundings.

    The finer of them stays.
    """
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if model.config.tie_word_embeddings or head.shape != embedding.shape:
        return
    with torch.no_grad():
        parts = zip(head.split(4096), embedding.split(4096), strict=True)  # no third table beside the two
        difference = sum(float((h - e).square().sum()) for h, e in parts)
        if difference > SAME_TABLE**2 * float(embedding.norm()) ** 2:
            return
    with extra("train"):
        from gguf import GGUFReader
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    if sizes["output.weight"] > sizes["token_embd.weight"]:
        embedding.data = head.data
    model.config.tie_word_embeddings = True
    model.tie_weights()
