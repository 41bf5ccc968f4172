"""What transformers drops when it reads a GGUF file as a source: the pre-tokenizer.

transformers 5.24 gives every byte-level BPE of a Llama-architecture GGUF GPT-2's splitting; the file names another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...runtime.base.extras import extra
from .pre_tokenizer import build_pre_tokenizer


def restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Give a tokenizer read from a GGUF file the pre-tokenizer that the file names; unknown names change nothing."""
    with extra("train"):
        from gguf import GGUFReader
    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    pre_tokenizer = build_pre_tokenizer(field.contents()) if field is not None else None
    if pre_tokenizer is not None:
        backend: Any = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizer
