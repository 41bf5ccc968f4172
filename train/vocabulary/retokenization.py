"""Convert text between the tokens of two tokenizers, and align both for distillation.

Text is split at control tokens, which are the same in both tokenizers, and the runs between them are encoded. A run may
start or end within a character, or within a word of SentencePiece. Its first and last tokens are then spelled in single
tokens or bytes.

For distillation, the model and its source both read a text in their own tokens. They are compared at positions where
tokens of both end at the same byte. There the source's distribution p over its next token gives the model's target.
If the source's next token is w, the model's next token is the first one that spells w:

    q(u) = sum of p(w) over the source's tokens w whose first token is u,

a distribution over the model's tokens (which includes p(u) if both have u). The alternative is to renormalise p over
the tokens that both have. This would teach the model that a text whose likeliest next token was removed continues with
something else. Within a token of the source there is no distribution to compare with, so only the text is learned.

Shapes: B rows, S of the model's tokens, T of the source's, V the source's vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..compute.loss import SourceText
from .pieces import bytes_of_tokens, tokenizer_data

EDGE_TOKENS = 8
"""Tokens at the start of a run that may be spelled instead of encoded. A character has at most 4 bytes."""


class ByteTokenizer:
    """A tokenizer with the bytes of its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        data = tokenizer_data(tokenizer)
        self.backend: Any = tokenizer.backend_tokenizer
        self.bytes = bytes_of_tokens(data)
        """{id: bytes of its text}, without control tokens."""
        self.added = {each["content"]: each["id"] for each in data.get("added_tokens", [])}
        self.added_texts = {index: text for text, index in self.added.items()}
        self.by_bytes: dict[bytes, int] = {}
        for index, value in self.bytes.items():
            self.by_bytes.setdefault(value, index)  # SentencePiece has "A" as a byte and as a token

    def length(self, index: int) -> int:
        """Return the bytes of a token, 1 for a control token."""
        # not 0: the positions before and after a control token must differ
        return len(self.bytes[index]) if index in self.bytes else 1

    def encode(self, value: bytes) -> list[int] | None:
        """Return tokens of exactly these bytes, or None if the tokenizer does not reproduce them."""
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            return None
        for each in (text, text.removeprefix(" ")):  # SentencePiece adds a space before every text
            ids: list[int] = self.backend.encode(each, add_special_tokens=False).ids
            if b"".join(self.bytes.get(index, b"\0") for index in ids) == value:
                return ids
        return None

    def spell(self, value: bytes) -> list[int]:
        """Return the token of these bytes, or one for each byte. A byte without a token is dropped."""
        if value in self.by_bytes:
            return [self.by_bytes[value]]
        singles = [value[at : at + 1] for at in range(len(value))]
        return [self.by_bytes[each] for each in singles if each in self.by_bytes]


class Retokenizer:
    """Converts tokens of one tokenizer to those of another."""

    def __init__(self, source: ByteTokenizer, target: ByteTokenizer) -> None:
        self.source, self.target = source, target

    def retokenize(self, ids: Sequence[int]) -> list[int]:
        """Return the target's tokens for the text of `ids`. An unknown control token is dropped."""
        found: list[int] = []
        for run in self._runs(ids):
            if run[0] in self.source.bytes:
                found += self._encode(run)
            elif (text := self.source.added_texts.get(run[0])) in self.target.added:
                found.append(self.target.added[text])
        return found

    def _runs(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield control tokens one by one and the runs of tokens between them."""
        start = 0
        for at, index in enumerate(ids):
            if index not in self.source.bytes:
                if at > start:
                    yield ids[start:at]
                yield ids[at : at + 1]
                start = at + 1
        if start < len(ids):
            yield ids[start:]

    def _encode(self, run: Sequence[int]) -> list[int]:
        """Encode a run, with as few tokens at its ends spelled as possible, or all if it cannot be encoded."""
        values = [self.source.bytes[index] for index in run]
        for left in range(min(EDGE_TOKENS, len(values))):
            if values[left][:1] and 0x80 <= values[left][0] < 0xC0:  # within a character
                continue
            # at most 3 tokens belong to a character of 4 bytes whose end is missing
            for right in range(min(4, len(values) - left)):
                end = len(values) - right
                inner = self.target.encode(b"".join(values[left:end]))
                if inner is not None:
                    return [*self._spell(values[:left]), *inner, *self._spell(values[end:])]
        return self._spell(values)

    def _spell(self, values: Sequence[bytes]) -> list[int]:
        return [index for value in values for index in self.target.spell(value)]


class TokenAligner:
    """Aligns the model's tokens with the source's tokens of the same text."""

    def __init__(
        self, model: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase, kept: Sequence[int], num_rows: int
    ) -> None:
        """Align by the tokenizers of both.

        `kept` are the source's ids of the model's tokens, `num_rows` the rows of the source's embedding.
        """
        self._model, self._source = ByteTokenizer(model), ByteTokenizer(source)
        self._retokenizer = Retokenizer(self._model, self._source)
        self._first = torch.zeros(num_rows, dtype=torch.int64)
        self._first[torch.as_tensor(list(kept))] = torch.arange(len(kept))
        for index in self._source.bytes.keys() - set(kept):
            # The bare model, because the token's text has passed the normalizer and pre-tokenizer already.
            tokens = self._model.backend.model.tokenize(source.convert_ids_to_tokens(index))
            if tokens:
                self._first[index] = tokens[0].id
            else:
                self._first[index] = self._model.spell(self._source.bytes[index])[0]

    def __call__(self, tokens: Tensor) -> SourceText:
        """Return the source's tokens for the text of the model's tokens [B, S], and their alignment."""
        rows = [self._align(row) for row in tokens.tolist()]
        width = max(len(ids) for ids, _ in rows)
        padded, places = [], []
        for index, (ids, places_in_row) in enumerate(rows):
            padded.append(ids + [0] * (width - len(ids)))  # padding after the text is never read
            places += [place if place < 0 else index * width + place for place in places_in_row]
        device = tokens.device
        return SourceText(
            torch.tensor(padded, device=device), torch.tensor(places, device=device), self._first.to(device)
        )

    def _align(self, row: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the source's tokens, and for each of the model's the index of the one with the same end, or -1."""
        ids = self._retokenizer.retokenize(row)
        source_ends = itertools.accumulate(self._source.length(index) for index in ids)
        place_of_end = {end: place for place, end in enumerate(source_ends)}
        model_ends = itertools.accumulate(self._model.length(index) for index in row)
        return ids, [place_of_end.get(end, -1) for end in model_ends]
