"""Convert a Hugging Face tokenizer.json to GGUF tokenizer fields. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...runtime.base.errors import ModelError
from ...runtime.base.extras import extra
from ...runtime.engines.hf_tokenizer import read_settings, special_token
from ...train.model.file_types import pre_tokenizer_name, steps_of
from ..checkpoint import Checkpoint


@dataclass(frozen=True)
class GgufTokenizer:
    """Fields under tokenizer.ggml."""

    model: str
    """gpt2 (byte-level BPE) or llama (SentencePiece)."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: list[str]
    token_types: list[int]
    """gguf.TokenType of each token."""
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    eot_id: int | None = None
    """A second end-of-generation token, if the model has one."""
    add_bos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None


def read_tokenizer(checkpoint: Checkpoint) -> GgufTokenizer:
    """Convert the checkpoint's tokenizer. Raises ModelError if llama.cpp has no equivalent."""
    data = checkpoint.tokenizer_data
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
    """Return (texts, gguf.TokenType) by id, `vocab_size` each. A model may have more rows than tokens."""
    with extra("gguf"):
        from gguf import TokenType
    # as llama.cpp's converter fills up rows without a token
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types: list[int] = [TokenType.UNUSED] * vocab_size
    for token, index in data["model"]["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    if data["model"].get("byte_fallback"):
        for index, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x"):
                types[index] = TokenType.BYTE
    for added in data.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    unknown = data["model"].get("unk_token")
    if unknown in tokens and data["model"].get("byte_fallback"):
        types[tokens.index(unknown)] = TokenType.UNKNOWN
    return tokens, types


def _special_ids(checkpoint: Checkpoint, tokens: list[str]) -> dict[str, int | None]:
    settings = read_settings(checkpoint.folder)
    index = {token: i for i, token in enumerate(tokens)}
    configured = {"bos": checkpoint.bos_id, "eos": next(iter(checkpoint.end_of_generation_ids), None)}
    names = ("bos", "eos", "unk", "pad")
    return {f"{name}_id": index.get(special_token(settings, name), configured.get(name)) for name in names}


def _adds_bos(data: dict[str, Any], tokens: list[str], bos_id: int | None) -> bool:
    """Tell whether the post-processor adds BOS at the beginning."""
    processors = data.get("post_processor") or {}
    for processor in processors.get("processors", [processors]):
        if processor.get("type") == "TemplateProcessing":
            first = next(iter(processor["single"]), {})
            if "SpecialToken" in first:
                return bos_id is not None and tokens[bos_id] == first["SpecialToken"]["id"]
    return False


def _adds_space(data: dict[str, Any]) -> bool:
    """Tell whether a space is added before the text (SentencePiece's dummy prefix)."""
    for step in steps_of(data.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend":
            return True
    return any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme") in ("first", "always")
        for step in steps_of(data.get("pre_tokenizer"), "pretokenizers")
    )
