"""Estimate how much longer a text becomes when a token is removed. Imports no torch.

    use(v)    = p(v) + sum of use(w) over the tokens w that v is a part of     (once for each occurrence)
    splits(v) = use(v) * (number of v's parts - 1)

in tokens per token of text. Tokens that v is a part of are removed before v, and each of their occurrences is then
written with v. So splits(v) is never below that of a token with v as a part, and removal in ascending order keeps the
parts of every token. p is how often a token is written. It combines the counts n(v) in N tokens of the run's text with
a prior that the tokenizer gives of its own training text (pieces.py):

    p(v) = (1 - w) n(v) / N + w prior(v).

Counts cover one kind of text only. The third of SmolLM2's tokens that counts alone select makes text of other kinds 4
to 7 % longer. The third that both together select makes it 3 to 4 % longer (research/log).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from ..data.chat import Encoder
from ..data.documents import DataSpec, Document, is_held_out, open_documents
from .pieces import Pieces

PRIOR_WEIGHT = 0.5
"""Weight w of the prior, because later text may be of other kinds."""

BATCH = 256
"""Documents tokenised in one call."""


def count_tokens(
    specs: Sequence[DataSpec],
    encoder: Encoder,
    held_out_fraction: float,
    num_rows: int,
    tokens: int,
    check: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Return how often each token occurs in about `tokens` tokens of the corpora's training part, fp64 [num_rows].

    A corpus that is too short for its share is read once, and its counts are scaled up to the share. `check` is
    called for every batch of documents and may raise.
    """
    total = sum(spec.weight for spec in specs)
    frequencies = np.zeros(num_rows)
    num_read = 0
    for spec in specs:
        counts = np.zeros(num_rows)
        for ids in _batches_of_ids(spec, encoder, held_out_fraction):
            check()
            counts += np.bincount(np.where(ids < 0, ~ids, ids), minlength=num_rows)
            if counts.sum() >= tokens * spec.weight / total:
                break
        num_read += int(counts.sum())
        frequencies += spec.weight / total * counts / max(1.0, counts.sum())
    return num_read * frequencies


def _batches_of_ids(spec: DataSpec, encoder: Encoder, held_out_fraction: float) -> Iterator[np.ndarray]:
    documents = (each for each in open_documents(spec) if not is_held_out(each, held_out_fraction))
    batches: Iterator[list[Document]] = iter(lambda: list(itertools.islice(documents, BATCH)), [])
    return (np.concatenate(encoder.encode(batch)) for batch in batches)


def expected_splits(pieces: Pieces, counts: np.ndarray, prior_weight: float = PRIOR_WEIGHT) -> np.ndarray:
    """Return the additional tokens per token of text if each token is removed, fp64 [rows].

    Tokens with it as a part are removed as well. The value is infinite for tokens that must stay and 0 for rows without
    a token.
    """
    use = (1.0 - prior_weight) * counts / max(1.0, counts.sum()) + prior_weight * pieces.prior
    # a token is longer than its parts, so its own use is complete before they get it
    longest_first = sorted(pieces.parts, key=lambda each: -len(pieces.texts[each]))
    for index in longest_first:
        for part in pieces.parts[index]:
            use[part] += use[index]
    splits = use.copy()
    for index, parts in pieces.parts.items():
        splits[index] *= len(parts) - 1
    splits[list(with_parts(pieces, pieces.fixed))] = np.inf
    return splits


def with_parts(pieces: Pieces, tokens: Iterable[int]) -> set[int]:
    """Return some tokens with their parts, the parts of these, and so on."""
    found: set[int] = set()
    waiting = list(tokens)
    while waiting:
        index = waiting.pop()
        if index not in found:
            found.add(index)
            waiting += pieces.parts.get(index, ())
    return found
