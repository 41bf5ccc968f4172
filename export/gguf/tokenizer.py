"""Convert a Hugging Face tokenizer.json to GGUF tokenizer fields. Imports no torch."""

from __future__ import annotations

from typing import Any

from ...runtime.base.errors import ModelError
from ...runtime.base.extras import extra
from ...runtime.engines.hf_tokenizer import is_byte, read_settings, special_token
from ...train.model.file_types import pre_tokenizer_name, steps_of
from ..checkpoint import Checkpoint


def add_tokenizer(writer: Any, checkpoint: Checkpoint) -> None:
    """Write the checkpoint's tokenizer under tokenizer.ggml. Raises ModelError if llama.cpp has no equivalent."""
    data = checkpoint.tokenizer_data
    model = data["model"]
    if model["type"] != "BPE":
        raise ModelError(f"tokenizer type {model['type']} is not supported for gguf; BPE and SentencePiece are")
    tokens, types = _tokens(data, checkpoint.architecture.vocab_size)
    is_sentencepiece = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if is_sentencepiece else "gpt2")  # gpt2 is byte-level BPE
    writer.add_tokenizer_pre("default" if is_sentencepiece else pre_tokenizer_name(data))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if is_sentencepiece:
        # BPE of SentencePiece models: merge order is id order, which is what scores of -id say
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
    elif model["merges"]:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    ids = _special_ids(checkpoint, tokens)
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(_adds_bos(data, tokens, ids["bos"]))
    writer.add_add_space_prefix(is_sentencepiece and _adds_space(data))
    if checkpoint.chat_template:
        writer.add_chat_template(checkpoint.chat_template)


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
            if is_byte(token):
                types[index] = TokenType.BYTE
    for added in data.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    unknown = data["model"].get("unk_token")
    if unknown in tokens and data["model"].get("byte_fallback"):
        types[tokens.index(unknown)] = TokenType.UNKNOWN
    return tokens, types


def _special_ids(checkpoint: Checkpoint, tokens: list[str]) -> dict[str, int | None]:
    """Return the ids of bos, eos, unk, pad and eot. The last is a second end-of-generation token, if there is one."""
    settings = read_settings(checkpoint.folder)
    index = {token: i for i, token in enumerate(tokens)}
    ends = checkpoint.end_of_generation_ids
    configured = {"bos": checkpoint.bos_id, "eos": next(iter(ends), None)}
    names = ("bos", "eos", "unk", "pad")
    ids = {name: index.get(special_token(settings, name), configured.get(name)) for name in names}
    return {**ids, "eot": next((i for i in ends if i != ids["eos"]), None)}


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
