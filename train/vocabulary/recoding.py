"""The same text in another tokenizer's tokens.

Text is cut at control tokens, which are the same in both, and encoded run by run. Where a run begins or ends within a
character, or (SentencePiece) within a word, its first and last tokens are written in bytes, or as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .needs import tokenizer_data
from .pieces import bytes_of_tokens

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
