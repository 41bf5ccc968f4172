"""What the tokens of a tokenizer.json are made of, which of them must stay, and in what order the others may go.

Byte-pair encoding makes a token by merging two others, so a token is of no use without its parts: whatever goes, all
that is made of it went before. Kept tokens then keep their whole derivations, and every kept token is still made of its
own text in the same way: of the merges that are left, the first to apply to it are those that were. Imports no torch.

Which tokens a model cannot do without: those of its tokenizer, of its settings and of its chat template.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...runtime.base.errors import ModelError, UsageError
from ...runtime.engines.hf_tokenizer import byte_alphabet
from ..data.chat import ChatFormat, end_of_text_id, tokenize
from .rewriting import named_tokens

SPACE = "▁"
"""What SentencePiece writes for a space; bytes in its place would be decoded to the sign itself."""


@dataclass(frozen=True)
class Pieces:
    """The tokens of a tokenizer, by id; rows of the embedding without a token are none."""

    size: int
    """Rows of the embedding."""
    texts: dict[int, str]
    """As tokenizer.json writes them."""
    parts: dict[int, tuple[int, ...]]
    """What a token becomes where it goes: what its last merge joins, or its bytes. None of Unigram's longer pieces,
    which becomes what is likeliest then."""
    fixed: frozenset[int]
    """Those that must stay whatever they cost."""
    prior: np.ndarray
    """fp64 [size]: how often each is to be expected before any text is seen. Sums to 1, positive where a token is."""


def read_pieces(data: Mapping[str, Any], num_rows: int) -> Pieces:
    """Of the contents of a tokenizer.json and an embedding of `num_rows` rows.

    What must stay: added tokens (control tokens among them), the unknown token, and what any text can be written in,
    which is byte-level BPE's alphabet, or SentencePiece's bytes, its space and ASCII; without bytes, every character.
    """
    model = data["model"]
    _check(model)
    is_unigram = model["type"] == "Unigram"
    vocab: dict[str, int] = {piece: i for i, (piece, _) in enumerate(model["vocab"])} if is_unigram else model["vocab"]
    added = {each["id"]: each["content"] for each in data.get("added_tokens", [])}
    texts = {index: text for text, index in vocab.items()} | added
    fixed = {*added, *_unknown(model, vocab)}
    parts = {} if is_unigram else _parts_of_merges(_merges(model), vocab)
    for text, index in vocab.items():
        if is_byte(text):
            fixed.add(index)
        elif len(text) == 1:
            spelt = _spelt_in_bytes(text, vocab) if model.get("byte_fallback") else None
            if spelt is None or text == SPACE or text.isascii():
                fixed.add(index)
            else:
                parts[index] = spelt
    prior = _scores(model, num_rows) if is_unigram else _by_merge_order(parts, texts, num_rows)
    return Pieces(num_rows, texts, parts, frozenset(fixed), prior / prior.sum())


def is_byte(text: str) -> bool:
    """Whether a SentencePiece token is a byte, as <0x0A>."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def bytes_of_tokens(data: Mapping[str, Any]) -> dict[int, bytes]:
    """{id: UTF-8 bytes of its text} of a tokenizer.json; added tokens, whose text is markup, are left out."""
    model = data["model"]
    pairs = enumerate(piece for piece, _ in model["vocab"]) if model["type"] == "Unigram" else None
    vocab = dict(pairs) if pairs is not None else {index: text for text, index in model["vocab"].items()}
    added = {each["id"] for each in data.get("added_tokens", [])}
    alphabet = byte_alphabet() if is_byte_level(data) else None
    return {index: _bytes_of(text, alphabet) for index, text in vocab.items() if index not in added}


def is_byte_level(data: Mapping[str, Any]) -> bool:
    """Whether a token's characters stand for bytes, as GPT-2's do."""
    steps = data.get("decoder") or {}
    return any(step.get("type") == "ByteLevel" for step in (steps, *steps.get("decoders", ())))


def _bytes_of(text: str, alphabet: Mapping[str, int] | None) -> bytes:
    if alphabet is not None and all(character in alphabet for character in text):
        return bytes(alphabet[character] for character in text)
    return bytes([int(text[3:5], 16)]) if is_byte(text) else text.replace(SPACE, " ").encode()


def _check(model: Mapping[str, Any]) -> None:
    kind = model["type"]
    if kind not in ("BPE", "Unigram"):
        raise ModelError(f"--prune vocabulary: a tokenizer of type {kind} is not supported; BPE and Unigram are")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ModelError(f"--prune vocabulary: a BPE tokenizer with {name} {model[name]!r} is not supported")


def _unknown(model: Mapping[str, Any], vocab: Mapping[str, int]) -> list[int]:
    if model["type"] == "Unigram":
        return [model["unk_id"]] if model.get("unk_id") is not None else []
    return [vocab[model["unk_token"]]] if model.get("unk_token") in vocab else []


def _spelt_in_bytes(character: str, vocab: Mapping[str, int]) -> tuple[int, ...] | None:
    """The byte tokens of a character; None where one of them is missing."""
    names = [f"<0x{byte:02X}>" for byte in character.encode()]
    return tuple(vocab[name] for name in names) if all(name in vocab for name in names) else None


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(left, right) for left, right in pairs]


def _parts_of_merges(merges: list[tuple[str, str]], vocab: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """{token: the two that the last merge of its own text joins}; SentencePiece's files have every split as a merge."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ways: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for pair in merges:
        ways["".join(pair)].append(pair)
    parts: dict[int, tuple[int, ...]] = {}
    for text, pairs in ways.items():
        pair = pairs[0] if len(pairs) == 1 else _last_merge(text, ranks)
        if pair is not None and text in vocab:
            parts[vocab[text]] = (vocab[pair[0]], vocab[pair[1]])
    return parts


def _last_merge(text: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """What byte-pair encoding of a token's text joins last; None where it does not end in one token."""
    symbols = list(text)
    pair: tuple[str, str] | None = None
    while len(symbols) > 1:
        pairs = [
            (ranks.get((left, right), len(ranks)), at) for at, (left, right) in enumerate(itertools.pairwise(symbols))
        ]
        rank, at = min(pairs)
        if rank == len(ranks):
            return None
        pair = (symbols[at], symbols[at + 1])
        symbols[at : at + 2] = ["".join(pair)]
    return pair


def _by_merge_order(parts: Mapping[int, tuple[int, ...]], texts: Mapping[int, str], num_rows: int) -> np.ndarray:
    """Zipf's law over the order of the ids, which is that of merges: each was the most frequent pair of the text that
    the tokenizer was trained on (on six kinds of English, it tells the length of a text without a third of SmolLM2's
    tokens as 1.036, which is 1.018 to 1.033). Tokens that no merge makes are last."""
    made = sorted(index for index, each in parts.items() if index in texts)
    prior = np.zeros(num_rows)
    prior[list(texts)] = 1e-3 / num_rows
    prior[made] = 1.0 / np.arange(1, len(made) + 1)
    return prior


def _scores(model: Mapping[str, Any], num_rows: int) -> np.ndarray:
    """Unigram's own probabilities."""
    prior = np.zeros(num_rows)
    scores = np.asarray([score for _, score in model["vocab"]])
    prior[: len(scores)] = np.exp(np.maximum(scores, -50.0))
    return prior


CONTENT = "?"
"""Stands for what is said in a chat."""


def tokenizer_data(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The contents of a tokenizer's tokenizer.json."""
    backend: Any = tokenizer.backend_tokenizer
    return json.loads(backend.to_str())


def pieces_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The tokens of a model; ModelError where its tokenizer is of a kind whose tokens cannot go."""
    pieces = read_pieces(tokenizer_data(tokenizer), int(model.config.vocab_size))
    named = named_tokens(model.config) | named_tokens(model.generation_config)
    fixed = pieces.fixed | named | template_tokens(tokenizer) | {end_of_text_id(tokenizer)}
    return replace(pieces, fixed=frozenset(fixed))


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that the chat template writes around what is said; none without one that writes a plain chat."""
    chat = ChatFormat.of_tokenizer(tokenizer)
    if chat is None:
        return set()
    turns = [{"role": role, "content": CONTENT} for role in ("system", "user", "assistant", "user")]
    texts = [chat.prompt(turns[1:2])]
    try:
        texts.append(chat.prompt(turns))
    except UsageError:  # some know no system
        texts.append(chat.prompt(turns[1:]))
    return {index for ids in tokenize(tokenizer, texts) for index in ids}
