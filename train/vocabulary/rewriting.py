"""A tokenizer, and the settings that name its tokens, without the tokens that are gone.

What stays keeps its order and is numbered anew, so that every reader of the files agrees: tokenizer.json and what is
written from it (GGUF's vocabulary, whose SentencePiece scores are the order of the ids).
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Of a tokenizer; what else is saved beside them (tokenizer.model, vocab.json) holds the vocabulary once more."""


class Numbering:
    """Old ids and new ones."""

    def __init__(self, kept: Sequence[int]) -> None:
        """`kept`: the ids that stay, in ascending order; their places are the new ids."""
        self.kept = list(kept)
        self.new = {old: new for new, old in enumerate(self.kept)}

    def ids(self, value: Any) -> Any:
        """A setting that is a token's id, a list of them, or neither (None, -1): with new ids; a list leaves out those
        that are gone."""
        if isinstance(value, list):
            return [self.new[each] for each in value if each in self.new]
        return self.new.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def smaller_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model whose embedding keeps these rows."""
    numbering = Numbering(kept)
    with tempfile.TemporaryDirectory(prefix="efficientllm-") as name:
        tokenizer.save_pretrained(name)
        path = Path(name) / "tokenizer.json"
        data = smaller_data(json.loads(path.read_text(encoding="utf-8")), numbering)
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        path = Path(name) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # tokenizer.json has them; here by their old ids
        path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        for stale in Path(name).iterdir():
            if stale.name not in FILES:
                stale.unlink()
        return AutoTokenizer.from_pretrained(name)


def smaller_data(data: Mapping[str, Any], numbering: Numbering) -> dict[str, Any]:
    """The contents of a tokenizer.json without what is gone: tokens, and the merges that make them or need them."""
    data = copy.deepcopy(dict(data))
    new, model = numbering.new, data["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [piece for index, piece in enumerate(model["vocab"]) if index in new]
        model["unk_id"] = numbering.ids(model.get("unk_id"))
    else:
        model["vocab"] = {text: new[index] for text, index in model["vocab"].items() if index in new}
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        vocab = model["vocab"]
        model["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= vocab.keys()]
    data["added_tokens"] = [{**each, "id": new[each["id"]]} for each in data.get("added_tokens", [])]
    if data.get("padding"):
        data["padding"]["pad_id"] = numbering.ids(data["padding"]["pad_id"])
    if data.get("post_processor"):
        _renumber_processor(data["post_processor"], numbering)
    return data


def _renumber_processor(processor: dict[str, Any], numbering: Numbering) -> None:
    """In place: what is put around a text (BOS), by its ids."""
    for each in processor.get("processors", ()):
        _renumber_processor(each, numbering)
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = numbering.ids(token["ids"])
    for name in ("sep", "cls"):  # of BERT and RoBERTa: [text, id]
        if isinstance(processor.get(name), list):
            text, index = processor[name]
            processor[name] = [text, numbering.ids(index)]


def renumber_settings(settings: Any, numbering: Numbering) -> None:
    """In place: every `..._token_id` of a model's or generation's configuration, and lists of tokens to suppress."""
    for name, value in vars(settings).items():
        if name.endswith("_token_id") or name in ("suppress_tokens", "begin_suppress_tokens"):
            setattr(settings, name, numbering.ids(value))


def named_tokens(settings: Any) -> set[int]:
    """Ids that a model's or generation's configuration names: they must stay."""
    found: set[int] = set()
    for name, value in vars(settings).items():
        if name.endswith("_token_id"):
            found |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    return {each for each in found if each >= 0}
