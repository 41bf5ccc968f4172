"""Scores of vocabulary rows: the expected loss when rows are removed and text is encoded without them.

The text of a removed token is encoded with its parts. With splits(v) further tokens per token of text (see
vocabulary/frequency.py), this costs loss(v) = price * splits(v) nats per token of text, on the scale of blocks.py. The
price, in nats per further token, is measured on the same text: once in the current tokens, and once without the rows of
a first ranking, with a softmax over the remaining rows.

The frequency of a token predicts its cost better than the saliency of its row. Zeroing a row is not a removal (the
logit becomes 0, not minus infinity), and a sample of gradients has a twentieth of the tokens. Rows are removed once, in
the first removal, as many as the whole budget takes from the ranking. From then on all text, including the training
text, is encoded with the parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from ..compute.distributed import Parallel
from ..compute.loss import TrainingLoss
from ..data.chat import end_of_text_id
from ..vocabulary.retokenization import ByteTokenizer, Retokenizer
from ..vocabulary.tokenizer_pruning import prune_tokenizer
from .blocks import LOGIT_ROWS, evaluating
from .surgery import removed_positions

TEXTS_AT_ONCE = 4
"""Texts per forward pass."""


class RowProbe:
    """Scores of the rows of the current model."""

    def __init__(
        self,
        loss: TrainingLoss,
        tokenizer: PreTrainedTokenizerBase,
        splits: np.ndarray,
        windows: np.ndarray,
        parallel: Parallel,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Use `splits` of every row and `windows` [n, S + 1] of text, the same on every rank.

        `check` is called before every measured text and may raise.
        """
        self._loss, self._tokenizer, self._parallel, self._check = loss, tokenizer, parallel, check
        self.splits = torch.from_numpy(splits)
        self._separator = end_of_text_id(tokenizer)
        tokens = np.where(windows < 0, ~windows, windows)
        self._texts = [row.tolist() for row in parallel.own_rows(tokens)]
        self._all_rows = torch.arange(len(splits), device=parallel.device)
        self._nats_before = self._nats(self._texts, self._all_rows)
        self.price = self._mean(self._nats_before, _num_tokens(self._texts))
        """Nats per further token. Before the measurement it is the average cost of a token, which is rarely less."""

    @property
    def scores(self) -> Tensor:
        """Return fp64 [rows], nats per token of text."""
        return self.price * self.splits

    def measure(self, kept: Sequence[int]) -> None:
        """Set the price to that of the model without the other rows (a collective call)."""
        smaller = prune_tokenizer(self._tokenizer, kept)
        retokenizer = Retokenizer(ByteTokenizer(self._tokenizer), ByteTokenizer(smaller))
        texts = [retokenizer.retokenize(text) for text in self._texts]
        further_nats = self._nats(texts, self._all_rows[torch.tensor(kept)]) - self._nats_before
        price = self._mean(further_nats, _num_tokens(texts) - _num_tokens(self._texts))
        # a short sample may have none of the removed tokens, or be cheaper by chance; the first estimate then stays
        if math.isfinite(price) and price > 0:
            self.price = price

    def describe(self, kept: Tensor) -> dict[str, float]:
        """Return the log fields of a removal that keeps these rows."""
        more = float(self.splits[removed_positions(kept, len(self.splits))].sum())
        return {"rows": len(kept), "nats_per_token_more": self.price, "tokens_more_per_token": more}

    def _mean(self, nats: float, count: int) -> float:
        """Return nats / count over all ranks, or NaN for no tokens."""
        total = torch.tensor([nats, float(count)], dtype=torch.float64, device=self._parallel.device)
        self._parallel.mean_tensors([total])
        return float(total[0] / total[1]) if total[1] > 0 else math.nan

    @torch.no_grad()
    def _nats(self, texts: Sequence[Sequence[int]], rows: Tensor) -> float:
        """Return the nats of all tokens of some texts, as positions in `rows`, over these rows of the LM head."""
        total = 0.0
        with evaluating(self._loss):
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                self._check()
                total += self._nats_of_batch(texts[start : start + TEXTS_AT_ONCE], rows)
        return total

    def _nats_of_batch(self, texts: Sequence[Sequence[int]], rows: Tensor) -> float:
        """Return the nats of some texts in one forward pass. Each text follows an end of text."""
        targets = [torch.tensor(text, device=rows.device) for text in texts]
        # ~0 pads the end: a token that is not predicted, and that no earlier one reads
        longest = max(map(len, texts))
        windows = torch.full((len(texts), 1 + longest), ~0, device=rows.device)
        windows[:, 0] = self._separator
        for window, target in zip(windows, targets, strict=True):
            window[1 : 1 + len(target)] = rows[target]

        def read(states: Tensor, head: Tensor) -> float:
            """Return the nats of all target tokens after `states` [N, D], by the head [V, D]."""
            # the head of the remaining rows only: their softmax, as after the removal
            nats, kept_head = 0.0, head[rows]
            pairs = zip(states.split(LOGIT_ROWS), torch.cat(targets).split(LOGIT_ROWS), strict=True)
            for some_states, some_targets in pairs:
                logits = (some_states @ kept_head.T).float()
                nats += float(functional.cross_entropy(logits, some_targets, reduction="sum"))
            return nats

        return self._loss(windows, read=read)


def _num_tokens(texts: Sequence[Sequence[int]]) -> int:
    return sum(len(text) for text in texts)


def choose_rows(probe: RowProbe, select: Callable[[Tensor], Sequence[int]]) -> Tensor:
    """Return fp64 [rows]: scores at the price of the removed rows. `select` returns the rows that scores would keep."""
    kept = select(probe.scores)
    if len(kept) < len(probe.splits):
        probe.measure(kept)
    return probe.scores
