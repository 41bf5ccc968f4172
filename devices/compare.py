"""Two runs side by side: what changed beyond noise.

Which results of two runs are of one artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from ..runtime.base.errors import UsageError
from ..runtime.base.quantities import Figure, markdown_table
from .report import print_rows
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


SMALLEST_CHANGE = 0.03
"""Relative change below which quartiles that happen to part mean nothing."""
MEMORY_CHANGE = 0.05
"""Of figures that are measured once."""
LEFT = (0, 1, 5)
"""Columns of the table that hold text."""


@dataclass(frozen=True)
class Change:
    """One figure of one artefact in both runs."""

    artefact: str
    figure: str
    old: float
    new: float
    beyond_noise: bool
    """Whether the quartile ranges do not overlap and the medians differ by more than 3 %."""
    better: bool

    @property
    def relative(self) -> float:
        return self.new / self.old - 1 if self.old else 0.0

    @property
    def verdict(self) -> str:
        return ("faster or smaller" if self.better else "SLOWER OR LARGER") if self.beyond_noise else "within noise"


def changes(old: Run, new: Run) -> list[Change]:
    """Every figure that both runs have, artefact by artefact; UsageError where they have no artefact in common."""
    found = pairs(old, new)
    if not found:
        before, after = (", ".join(run.labels) for run in (old, new))
        raise UsageError(f"the runs have no artefact in common: {before}; {after}")
    return [
        change
        for before, after in found
        for change in _of_artefact(new.labels[after], old.results[before], new.results[after])
    ]


def _of_artefact(label: str, old: Result, new: Result) -> list[Change]:
    found = [
        _of_figures(label, f"{test} t/s", old.speeds[test], figure, higher_is_better=True)
        for test, figure in new.speeds.items()
        if test in old.speeds
    ]
    found += [
        _of_figures(label, f"{test} CPU ms/token", old.cpu_ms_per_token[test], figure, higher_is_better=False)
        for test, figure in new.cpu_ms_per_token.items()
        if test in old.cpu_ms_per_token
    ]
    for name in ("load_ms", "time_to_first_token_ms", "joules_per_token"):
        before, after = getattr(old, name), getattr(new, name)
        if before and after:
            found.append(_of_figures(label, name, before, after, higher_is_better=False))
    for name in ("file_bytes", "peak_rss_bytes"):
        before, after = getattr(old, name), getattr(new, name)
        if before and after:
            differs = abs(after / before - 1) > MEMORY_CHANGE
            found.append(Change(label, name, before, after, differs, after < before))
    return found


def _of_figures(artefact: str, name: str, old: Figure, new: Figure, higher_is_better: bool) -> Change:
    apart = new.low > old.high or new.high < old.low
    beyond = apart and abs(new.median / old.median - 1) > SMALLEST_CHANGE
    return Change(artefact, name, old.median, new.median, beyond, (new.median > old.median) == higher_is_better)


def differences(old: Run, new: Run) -> list[str]:
    """What besides the artefacts differs between the runs, so that figures are not put down to the wrong cause."""
    found = []
    for name in ("name", "machine", "cpu", "cores", "system", "virtual"):
        before, after = getattr(old.device, name), getattr(new.device, name)
        if before != after:
            found.append(f"device {name} differs: {before} and {after}")
    if old.options.threads != new.options.threads:
        found.append(f"threads differ: {old.options.threads or 'all'} and {new.options.threads or 'all'}")
    matched = pairs(old, new)
    for index, other in matched:
        before, after, label = old.results[index], new.results[other], new.labels[other]
        if before.engine_version != after.engine_version:
            found.append(f"{label}: engine differs: {before.engine_version} and {after.engine_version}")
        if before.sha256 != after.sha256:
            found.append(f"{label}: the files differ: {_file(before)} and {_file(after)}")
    return found + [
        line
        for number, (when, run) in enumerate((("old", old), ("new", new)))
        for line in _of_one_run(when, run, {pair[number] for pair in matched})
    ]


def _file(result: Result) -> str:
    return f"{result.artefact} (SHA-256 {result.sha256[:12]}...)"


def _of_one_run(when: str, run: Run, matched: Collection[int]) -> list[str]:
    emulated = [f"the {when} run is EMULATED, no figure of it is the device's"] if run.device.emulated else []
    alone = [label for index, label in enumerate(run.labels) if index not in matched]
    return emulated + [f"{label}: in the {when} run only" for label in alone]


def _rows(found: Sequence[Change]) -> list[list[str]]:
    header = ["artefact", "figure", "old", "new", "change", ""]
    return [header] + [
        [
            change.artefact,
            change.figure,
            f"{change.old:,.4g}" if change.old < 1e4 else f"{change.old:,.0f}",
            f"{change.new:,.4g}" if change.new < 1e4 else f"{change.new:,.0f}",
            f"{100 * change.relative:+.1f} %",
            change.verdict,
        ]
        for change in found
    ]


def markdown(found: Sequence[Change]) -> str:
    return markdown_table(_rows(found), LEFT) + "\n"


def print_table(found: Sequence[Change]) -> None:
    print_rows(_rows(found), LEFT)
