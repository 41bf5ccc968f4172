"""How much longer a text becomes for every token that goes.

    use(v)    = p(v) + sum of use(w) over the tokens w that v is a part of     (once for each time that it is)
    splits(v) = use(v) * (number of v's parts - 1)

in tokens a token of text: those that v is a part of go before it, and each time that one of them was written it is v
that is written then. So splits(v) never is below that of what v is a part of, and taking the least first keeps every
token's parts. p is how often a token is written: by counts n(v) in N tokens of the run's text, and by what the
tokenizer itself tells of the text that it was trained on (pieces.py),

    p(v) = (1 - w) n(v) / N + w prior(v).

Counts alone know one kind of text: of SmolLM2's tokens they take those that make a text of another kind 4 to 7 % longer
where the two together take as many that make it 3 to 4 % longer (research/log). Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from ..data.chat import Encoder
from ..data.documents import DataSpec, Document, is_held_out, open_documents
from .pieces import Pieces

BATCH = 256
"""Documents tokenised in one call."""


def count_tokens(
    specs: Sequence[DataSpec], encoder: Encoder, held_out_fraction: float, num_rows: int, tokens: int
) -> np.ndarray:
    """fp64 [num_rows]: how often each token is written in about `tokens` tokens of the corpora's training part.

    Corpora have their shares, also one that is too short for its share: it is read once, and its counts are scaled.
    """
    total = sum(spec.weight for spec in specs)
    shares = np.zeros(num_rows)
    seen = 0
    for spec in specs:
        found = np.zeros(num_rows)
        for ids in _ids(spec, encoder, held_out_fraction):
            found += np.bincount(np.where(ids < 0, ~ids, ids), minlength=num_rows)
            if found.sum() >= tokens * spec.weight / total:
                break
        seen += int(found.sum())
        shares += spec.weight / total * found / max(1.0, found.sum())
    return seen * shares


def _ids(spec: DataSpec, encoder: Encoder, held_out_fraction: float) -> Iterator[np.ndarray]:
    documents = (each for each in open_documents(spec) if not is_held_out(each, held_out_fraction))
    batches: Iterator[list[Document]] = iter(lambda: list(itertools.islice(documents, BATCH)), [])
    return (np.concatenate(encoder.encode(batch)) for batch in batches)


def expected_splits(pieces: Pieces, counts: np.ndarray, prior_weight: float) -> np.ndarray:
    """fp64 [rows]: tokens more, for each token of text, where a token goes after all that it is a part of; infinite
    where it must stay, 0 for rows without a token."""
    use = (1.0 - prior_weight) * counts / max(1.0, counts.sum()) + prior_weight * pieces.prior
    for index in sorted(pieces.parts, key=lambda each: -len(pieces.texts[each])):  # a token is longer than its parts
        for part in pieces.parts[index]:
            use[part] += use[index]
    splits = use.copy()
    for index, parts in pieces.parts.items():
        splits[index] *= len(parts) - 1
    splits[list(with_parts(pieces, pieces.fixed))] = np.inf
    return splits


def with_parts(pieces: Pieces, tokens: Sequence[int] | frozenset[int]) -> set[int]:
    """Tokens and all that they are made of."""
    found: set[int] = set()
    waiting = list(tokens)
    while waiting:
        index = waiting.pop()
        if index not in found:
            found.add(index)
            waiting += pieces.parts.get(index, ())
    return found
