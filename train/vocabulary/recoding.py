"""The same text in another tokenizer's tokens.

Text is cut at control tokens, which are the same in both, and encoded run by run. Where a run begins or ends within a
character, or (SentencePiece) within a word, its first and last tokens are written in bytes, or as they are.

Distillation where model and source read the same text in different tokens.

Both read it as their own tokenizers write it, and are compared where both stand at the same byte. There the source's
distribution over its next token says what the model's next token should be: where the source would write w, the model
writes the first of the tokens that w is made of by then, so

    q(u) = sum of p(w) over the source's tokens w whose first token is u,

a distribution over the model's tokens (u itself is among the w where both have it). Leaving the removed tokens' share
out instead, by renormalising over the tokens that both have, would teach that text which they were the best guess for
goes on with something else. Amid what was one of the source's tokens there is nothing to compare with: the text alone
teaches there.

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

EDGE = 8
"""Tokens at either end of a run that may be left out of its text: a character has at most 4 bytes."""


class Reading:
    """A tokenizer as what it makes of bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        data = tokenizer_data(tokenizer)
        self.backend: Any = tokenizer.backend_tokenizer
        self.bytes = bytes_of_tokens(data)
        """{id: its text's bytes}, control tokens left out."""
        self.added = {each["content"]: each["id"] for each in data.get("added_tokens", [])}
        self.added_texts = {index: text for text, index in self.added.items()}
        self.by_bytes: dict[bytes, int] = {}
        for index, value in self.bytes.items():
            self.by_bytes.setdefault(value, index)

    def length(self, index: int) -> int:
        """Bytes of a token; 1 of a control token, so that positions after it differ from those before."""
        return len(self.bytes[index]) if index in self.bytes else 1

    def encode(self, value: bytes) -> list[int] | None:
        """Tokens of exactly these bytes; None where they are no text that this tokenizer gives back."""
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            return None
        for each in (text, text.removeprefix(" ")):  # SentencePiece puts a space before every text
            ids: list[int] = self.backend.encode(each, add_special_tokens=False).ids
            if b"".join(self.bytes.get(index, b"\0") for index in ids) == value:
                return ids
        return None

    def spell(self, value: bytes) -> list[int]:
        """Tokens of any bytes: one where there is one, else one for each byte (nothing where a byte has none)."""
        if value in self.by_bytes:
            return [self.by_bytes[value]]
        singles = [value[at : at + 1] for at in range(len(value))]
        return [self.by_bytes[each] for each in singles if each in self.by_bytes]


class Recoder:
    """From one tokenizer's tokens to another's."""

    def __init__(self, source: Reading, target: Reading) -> None:
        self.source, self.target = source, target

    def recode(self, ids: Sequence[int]) -> list[int]:
        """The target's tokens of the text of `ids`; an unknown control token is left out."""
        found: list[int] = []
        for run in self._runs(ids):
            if run[0] in self.source.bytes:
                found += self._text(run)
            elif (text := self.source.added_texts.get(run[0])) in self.target.added:
                found.append(self.target.added[text])
        return found

    def _runs(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Control tokens one by one, and what lies between them."""
        start = 0
        for at, index in enumerate(ids):
            if index not in self.source.bytes:
                if at > start:
                    yield ids[start:at]
                yield ids[at : at + 1]
                start = at + 1
        if start < len(ids):
            yield ids[start:]

    def _text(self, run: Sequence[int]) -> list[int]:
        values = [self.source.bytes[index] for index in run]
        for left in range(min(EDGE, len(values))):
            if values[left][:1] and 0x80 <= values[left][0] < 0xC0:  # amid a character
                continue
            for right in range(min(4, len(values) - left)):
                inner = self.target.encode(b"".join(values[left : len(values) - right]))
                if inner is not None:
                    before, after = values[:left], values[len(values) - right :]
                    return [*self._spelt(before), *inner, *self._spelt(after)]
        return self._spelt(values)

    def _spelt(self, values: Sequence[bytes]) -> list[int]:
        return [index for value in values for index in self.target.spell(value)]


class TwoReadings:
    """The source's reading of what the model reads."""

    def __init__(
        self, model: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase, kept: Sequence[int], num_rows: int
    ) -> None:
        """`kept`: the source's ids of the model's tokens; `num_rows`: of the source's embedding."""
        self._ours, self._theirs = Reading(model), Reading(source)
        self._recoder = Recoder(self._ours, self._theirs)
        self._first = torch.zeros(num_rows, dtype=torch.int64)
        self._first[torch.as_tensor(list(kept))] = torch.arange(len(kept))
        staying = set(kept)
        for index, value in self._theirs.bytes.items():
            if index not in staying:
                tokens = self._ours.backend.model.tokenize(source.convert_ids_to_tokens(index))
                self._first[index] = tokens[0].id if tokens else self._ours.spell(value)[0]

    def __call__(self, tokens: Tensor) -> SourceText:
        """Of tokens [B, S] that the model reads."""
        rows = [self._row(row) for row in tokens.tolist()]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])  # what follows is never seen
        places = torch.tensor(
            [[place if place < 0 else place + at * width for place in each] for at, (_, each) in enumerate(rows)]
        )
        device = tokens.device
        return SourceText(ids.to(device), places.flatten().to(device), self._first.to(device))

    def _row(self, row: Sequence[int]) -> tuple[list[int], list[int]]:
        """(the source's tokens of the text, for each of the model's the source's that ends where it ends, else -1)"""
        ids = self._recoder.recode(row)
        ends = {end: place for place, end in enumerate(itertools.accumulate(map(self._theirs.length, ids)))}
        return ids, [ends.get(end, -1) for end in itertools.accumulate(map(self._ours.length, row))]
