"""A Hugging Face tokenizer.json as GGUF tokenizer fields. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...runtime.base.errors import ModelError
from ..checkpoint import Checkpoint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""gguf.TokenType"""

_LETTERS_1_TO_3_DIGITS = r"\p{N}{1,3}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


@dataclass(frozen=True)
class GgufTokenizer:
    """Fields under tokenizer.ggml."""

    model: str
    """gpt2 (byte-level BPE) or llama (SentencePiece)."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: list[str]
    token_types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    eot_id: int | None = None
    """A second end-of-generation token, where the model has one."""
    add_bos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None


def read_tokenizer(checkpoint: Checkpoint) -> GgufTokenizer:
    """Translate the checkpoint's tokenizer; ModelError where llama.cpp has no equivalent."""
    data = checkpoint.json_file("tokenizer.json")
    if not data:
        raise ModelError(f"{checkpoint.name} has no tokenizer.json; save it with a fast tokenizer")
    if data["model"]["type"] != "BPE":
        raise ModelError(f"tokenizer type {data['model']['type']} is not supported for gguf; BPE and SentencePiece are")
    vocab_size = checkpoint.architecture.vocab_size
    tokens, types = _tokens(data, vocab_size)
    model = data["model"]
    special = _special_ids(checkpoint, tokens)
    ends = checkpoint.end_of_generation_ids
    common: dict[str, Any] = {
        "tokens": tokens,
        "token_types": types,
        **special,
        "eot_id": next((i for i in ends if i != special["eos_id"]), None),
        "add_bos": _adds_bos(data, tokens, special["bos_id"]),
        "chat_template": checkpoint.chat_template,
    }
    if model.get("byte_fallback"):
        # BPE of SentencePiece models: merge order is id order, which is what scores of -id say
        scores = [-float(index) for index in range(len(tokens))]
        return GgufTokenizer("llama", "default", scores=scores, add_space_prefix=_adds_space(data), **common)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return GgufTokenizer("gpt2", pre_tokenizer_name(data), merges=merges, **common)


def _tokens(data: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in data["model"]["vocab"].items():
        if index < vocab_size:
            tokens[index], types[index] = token, NORMAL
    if data["model"].get("byte_fallback"):
        for index, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x"):
                types[index] = BYTE
    for added in data.get("added_tokens", []):
        if added["id"] < vocab_size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = data["model"].get("unk_token")
    if unknown in tokens and data["model"].get("byte_fallback"):
        types[tokens.index(unknown)] = UNKNOWN
    return tokens, types


def _special_ids(checkpoint: Checkpoint, tokens: list[str]) -> dict[str, int | None]:
    config, tokenizer_config = checkpoint.config, checkpoint.json_file("tokenizer_config.json")
    index = {token: i for i, token in enumerate(tokens)}
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = tokenizer_config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        value = index.get(content) if content else None
        if value is None and name in ("bos", "eos"):
            configured = config.get(f"{name}_token_id")
            value = configured[0] if isinstance(configured, list) else configured
        ids[f"{name}_id"] = value
    return ids


def _adds_bos(data: dict[str, Any], tokens: list[str], bos_id: int | None) -> bool:
    """Whether the post-processor puts BOS first."""
    processors = data.get("post_processor") or {}
    for processor in processors.get("processors", [processors]):
        if processor.get("type") == "TemplateProcessing":
            first = processor["single"][0]
            if "SpecialToken" in first:
                return bos_id is not None and tokens[bos_id] == first["SpecialToken"]["id"]
    return False


def _adds_space(data: dict[str, Any]) -> bool:
    """Whether a space is put before the text (SentencePiece's dummy prefix)."""
    for step in _steps(data.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend":
            return True
    return any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme") in ("first", "always")
        for step in _steps(data.get("pre_tokenizer"), "pretokenizers")
    )


def _steps(value: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if not value:
        return []
    return value[key] if value.get("type") == "Sequence" else [value]


def pre_tokenizer_name(data: dict[str, Any]) -> str:
    """llama.cpp's name for a byte-level BPE's pre-tokenizer; ModelError where it has none that we know."""
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and _CONTRACTIONS in patterns[0]:
        if _LETTERS_1_TO_3_DIGITS in patterns[0]:
            return "llama-bpe"
        if r"\p{N}" in patterns[0]:
            return "qwen2"
    raise ModelError(f"pre-tokenizer {'+'.join(kinds) or 'none'} {patterns} has no known name in llama.cpp")
