"""llama.cpp's names for the pre-tokenizers of byte-level BPE, in both directions. Imports no torch."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, pre_tokenizers

from ...runtime.base.errors import ModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_DIGITS = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
"""How those that split by one pattern take numbers; a pattern with the first also contains the second."""


def build_pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """The pre-tokenizer of the family's own tokenizer.json; None where llama.cpp's `name` is not among ours."""
    if name == "smollm":
        steps: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    elif name in _DIGITS:
        pattern = Regex(_CONTRACTIONS + _WORDS + _DIGITS[name] + _REST)
        steps = [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        return None
    return pre_tokenizers.Sequence(steps)


def pre_tokenizer_name(data: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json; ModelError where it has none that we know."""
    steps = steps_of(data.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and _CONTRACTIONS in patterns[0]:
        for name, digits in _DIGITS.items():
            if digits in patterns[0]:
                return name
    raise ModelError(f"pre-tokenizer {'+'.join(kinds) or 'none'} {patterns} has no known name in llama.cpp")


def steps_of(value: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in tokenizer.json; `key` is where a Sequence keeps them."""
    if not value:
        return []
    return value[key] if value.get("type") == "Sequence" else [value]
