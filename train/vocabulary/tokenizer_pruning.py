"""Remove tokens from a tokenizer and from the settings that name them.

Kept tokens keep their order and get new ids without gaps. So all readers agree: those of tokenizer.json, and those of
files written from it, such as GGUF's vocabulary, whose SentencePiece scores are the order of the ids.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files of a tokenizer. Others beside them, such as tokenizer.model or vocab.json, hold the old vocabulary."""


def prune_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model whose embedding keeps the rows `kept`, in ascending order."""
    with tempfile.TemporaryDirectory(prefix="efficientllm-") as name:
        tokenizer.save_pretrained(name)
        path = Path(name) / "tokenizer.json"
        data = _prune_data(json.loads(path.read_text(encoding="utf-8")), _new_ids(kept))
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        path = Path(name) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # it has the old ids, and tokenizer.json has these tokens as well
        path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        for stale in Path(name).iterdir():
            if stale.name not in FILES:
                stale.unlink()
        return AutoTokenizer.from_pretrained(name)


def renumber_settings(settings: Any, kept: Sequence[int]) -> None:
    """Renumber in place each `..._token_id` and list of suppressed tokens of a model's or generation's config."""
    new_ids = _new_ids(kept)
    for name, value in vars(settings).items():
        if name.endswith("_token_id") or name in ("suppress_tokens", "begin_suppress_tokens"):
            setattr(settings, name, _renumbered(value, new_ids))


def named_token_ids(settings: Any) -> set[int]:
    """Return the ids that a model's or generation's configuration names. These tokens must stay."""
    found: set[int] = set()
    for name, value in vars(settings).items():
        if name.endswith("_token_id"):
            listed = value if isinstance(value, list) else [value]
            found |= {each for each in listed if isinstance(each, int) and each >= 0}  # None and -1 name no token
    return found


def merges_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a BPE model, which older files write as strings."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _new_ids(kept: Sequence[int]) -> dict[int, int]:
    return {old: new for new, old in enumerate(kept)}


def _renumbered(value: Any, new_ids: Mapping[int, int]) -> Any:
    """Return a token id or a list of ids renumbered. Removed tokens are dropped from a list.

    Other values, such as None or -1, are unchanged.
    """
    if isinstance(value, list):
        return [new_ids[each] for each in value if each in new_ids]
    return new_ids.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _prune_data(data: dict[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Remove tokens, and merges that make or use them, from the contents of a tokenizer.json. Returns `data`."""
    model = data["model"]
    vocab = {text: new_ids[index] for text, index in model["vocab"].items() if index in new_ids}
    # tokenizers refuses a merge whose parts or result are not in the vocabulary
    merges = [(a, b) for a, b in merges_of(model) if a in vocab and b in vocab and a + b in vocab]
    model["vocab"], model["merges"] = vocab, merges
    for token in data.get("added_tokens", []):
        token["id"] = new_ids[token["id"]]
    if data.get("padding"):
        data["padding"]["pad_id"] = _renumbered(data["padding"]["pad_id"], new_ids)
    if data.get("post_processor"):
        _renumber_processor(data["post_processor"], new_ids)
    return data


def _renumber_processor(processor: dict[str, Any], new_ids: Mapping[int, int]) -> None:
    """Renumber in place the tokens that a post-processor adds to a text, such as BOS."""
    for each in processor.get("processors", ()):
        _renumber_processor(each, new_ids)
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = _renumbered(token["ids"], new_ids)
    for name in ("sep", "cls"):  # of BERT and RoBERTa: [text, id]
        if isinstance(processor.get(name), list):
            text, index = processor[name]
            processor[name] = [text, _renumbered(index, new_ids)]
