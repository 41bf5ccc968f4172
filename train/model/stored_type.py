"""What a source says before its weights are read: its shape and the type in which it is stored."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from ...runtime.base.errors import EfficientLLMError
from ...runtime.base.extras import extra
from .architecture import Architecture
from .installed_files import source_path

GGUF_FILE_TYPES = {0: torch.float32, 1: torch.float16}
"""`general.file_type` of GGUF files (llama.cpp's LLAMA_FTYPE) whose matrices are fp32 or fp16."""


def shape_of_folder(source: str) -> Architecture | None:
    """Of a local folder; None for everything else and for a folder that `load_source` will refuse."""
    try:
        return Architecture.from_folder(Path(source)) if (Path(source) / "config.json").is_file() else None
    except (EfficientLLMError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def stored_dtype(source: str) -> torch.dtype:
    """Of a source that `load_source` has loaded.

    A quantised GGUF file has no such type. It counts as bf16, in which models are published: that rounds a weight by
    1/512 of itself at most, where a block of 4 or 5 bits rounds it by 1/32 of the block's largest.
    """
    path = source_path(source)
    if path.suffix == ".gguf":
        with extra("train"):
            from gguf import GGUFReader
        field = GGUFReader(path).fields.get("general.file_type")
        return GGUF_FILE_TYPES.get(int(field.contents()), torch.bfloat16) if field is not None else torch.bfloat16
    dtype = AutoConfig.from_pretrained(source).dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32
