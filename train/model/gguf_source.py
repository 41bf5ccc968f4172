"""What transformers drops when it reads a GGUF file as a source: the pre-tokenizer.

transformers 5.24 gives every byte-level BPE of a Llama-architecture GGUF GPT-2's splitting; the file names another one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from ...runtime.base.extras import extra

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _smollm() -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "smollm": _smollm,
    "llama-bpe": lambda: _split(_WORDS + r"\p{N}{1,3}" + _REST),
    "qwen2": lambda: _split(_WORDS + r"\p{N}" + _REST),
}
"""llama.cpp's name -> the pre-tokenizer of the family's own tokenizer.json."""


def restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Give a tokenizer read from a GGUF file the pre-tokenizer that the file names; unknown names change nothing."""
    with extra("train"):
        from gguf import GGUFReader
    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    name = field.contents() if field is not None else None
    if name in PRE_TOKENIZERS:
        backend: Any = tokenizer.backend_tokenizer
        backend.pre_tokenizer = PRE_TOKENIZERS[name]()
