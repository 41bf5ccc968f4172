"""Distillation where model and source read the same text in different tokens.

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
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..compute.loss import SourceText
from .recoding import Reading, Recoder


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
