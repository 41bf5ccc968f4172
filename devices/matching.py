"""Which results of two runs are of one artefact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from .results import Result, Run

IDENTITIES: Sequence[Callable[[Result], tuple[str, ...]]] = (
    lambda result: (result.sha256, result.artefact, result.engine_version),
    lambda result: (result.sha256, result.engine_version),
    lambda result: (result.sha256,),
    lambda result: (result.artefact, result.engine_version),
    lambda result: (result.artefact,),
)
"""What makes two results those of one artefact, the surest first: what it holds, then where it lies."""


def pairs(old: Run, new: Run) -> list[tuple[int, int]]:
    """Indices of the results of one artefact in both runs, each in one pair at most, in the order of the new run.

    What no identity matches is matched by file name where no other of its run has it: every export's is model.gguf.
    """
    left, right, found = dict(enumerate(old.results)), dict(enumerate(new.results)), []

    def take(before: int, after: int) -> None:
        found.append((before, after))
        del left[before], right[after]

    for identity in IDENTITIES:
        for index in list(right):
            key = identity(right[index])
            same = [other for other in left if identity(left[other]) == key]
            if same and all(key):
                take(same[0], index)
    before, after = (_by_unique_name(run) for run in (old, new))
    for name in before.keys() & after.keys():
        if before[name] in left and after[name] in right:
            take(before[name], after[name])
    return sorted(found, key=itemgetter(1))


def _by_unique_name(run: Run) -> dict[str, int]:
    names = [Path(result.artefact).name for result in run.results]
    return {name: index for index, name in enumerate(names) if names.count(name) == 1}
