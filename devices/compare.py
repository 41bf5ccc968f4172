"""Comparison of two runs, and of a run with the predictions of a device profile."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from ..runtime.base.errors import UsageError
from ..runtime.base.quantities import Figure, markdown_table
from ..runtime.latency.profile import DeviceProfile
from ..runtime.latency.shape import DecoderShape
from .results import Result, Run, mean_context
from .run_table import print_rows

SPEED_CHANGE = 0.03
"""Smallest relative change of a median that counts if the quartile ranges do not overlap."""
MEMORY_CHANGE = 0.05
"""Smallest relative change that counts for figures that are measured once."""
TEXT_COLUMNS = (0, 1, 5)


@dataclass(frozen=True)
class Change:
    """One figure of one artefact in both runs."""

    artefact: str
    figure: str
    old: float
    new: float
    beyond_noise: bool
    """True if the change exceeds the noise, by SPEED_CHANGE and the quartile ranges, or by MEMORY_CHANGE."""
    better: bool

    @property
    def relative(self) -> float:
        return self.new / self.old - 1 if self.old else 0.0

    @property
    def verdict(self) -> str:
        if not self.beyond_noise:
            return "within noise"
        return "faster or smaller" if self.better else "SLOWER OR LARGER"


def pairs(old: Run, new: Run) -> list[tuple[int, int]]:
    """Return the indices of results of one artefact in both runs, each at most once, in the order of the new run.

    Equal contents match best, then equal paths. A file name matches only if no other result of its run has it,
    because each export writes a model.gguf. Equal engine versions decide between equal matches.
    """
    unique_names = [_unique_names(run) for run in (old, new)]
    candidates = []
    for new_index, after in enumerate(new.results):
        for old_index, before in enumerate(old.results):
            same_file = bool(after.sha256) and before.sha256 == after.sha256
            same_path = before.artefact == after.artefact
            name = Path(after.artefact).name
            same_name = name == Path(before.artefact).name and all(name in names for names in unique_names)
            if same_file or same_path or same_name:
                same_version = before.engine_version == after.engine_version
                closeness = (same_file, same_file and same_version, same_path, same_version)
                candidates.append((closeness, old_index, new_index))
    matched: list[tuple[int, int]] = []
    for _, old_index, new_index in sorted(candidates, key=itemgetter(0), reverse=True):
        if all(old_index != left and new_index != right for left, right in matched):
            matched.append((old_index, new_index))
    return sorted(matched, key=itemgetter(1))


def _unique_names(run: Run) -> set[str]:
    names = [Path(result.artefact).name for result in run.results]
    return {name for name in names if names.count(name) == 1}


def changes(old: Run, new: Run) -> list[Change]:
    """Return the change of each figure in both runs, by artefact. Raises UsageError without a common artefact."""
    matched = pairs(old, new)
    if not matched:
        before, after = (", ".join(run.labels) for run in (old, new))
        raise UsageError(f"the runs have no artefact in common: {before}; {after}")
    labels = new.labels
    found: list[Change] = []
    for old_index, new_index in matched:
        found += _artefact_changes(labels[new_index], old.results[old_index], new.results[new_index])
    return found


def _artefact_changes(label: str, old: Result, new: Result) -> list[Change]:
    found: list[Change] = []
    for test, figure in new.speeds.items():
        if before := old.speeds.get(test):
            found.append(_figure_change(label, f"{test} t/s", before, figure, higher_is_better=True))
    for test, figure in new.cpu_ms_per_token.items():
        if before := old.cpu_ms_per_token.get(test):
            found.append(_figure_change(label, f"{test} CPU ms/token", before, figure, higher_is_better=False))
    for name in ("load_ms", "time_to_first_token_ms", "joules_per_token"):
        before, after = getattr(old, name), getattr(new, name)
        if before and after:
            found.append(_figure_change(label, name, before, after, higher_is_better=False))
    for name in ("file_bytes", "peak_rss_bytes"):
        before, after = getattr(old, name), getattr(new, name)
        if before and after:
            beyond_noise = abs(after / before - 1) > MEMORY_CHANGE
            found.append(Change(label, name, before, after, beyond_noise, after < before))
    return found


def _figure_change(artefact: str, name: str, old: Figure, new: Figure, higher_is_better: bool) -> Change:
    # Quartiles of few rounds may be apart by chance, and those of many rounds for a change that nobody notices.
    is_apart = new.low > old.high or new.high < old.low
    beyond_noise = is_apart and abs(new.median / old.median - 1) > SPEED_CHANGE
    is_better = (new.median > old.median) == higher_is_better
    return Change(artefact, name, old.median, new.median, beyond_noise, is_better)


def other_differences(old: Run, new: Run) -> list[str]:
    """Return lines on devices, threads, engines, files and artefacts that differ and may explain a change."""
    lines = []
    for name in ("name", "machine", "cpu", "cores", "system", "virtual"):
        before, after = getattr(old.device, name), getattr(new.device, name)
        if before != after:
            lines.append(f"device {name} differs: {before} and {after}")
    if old.options.threads != new.options.threads:
        lines.append(f"threads differ: {old.options.threads or 'all'} and {new.options.threads or 'all'}")
    matched = pairs(old, new)
    for old_index, new_index in matched:
        before, after, label = old.results[old_index], new.results[new_index], new.labels[new_index]
        if before.engine_version != after.engine_version:
            lines.append(f"{label}: engine differs: {before.engine_version} and {after.engine_version}")
        if before.sha256 != after.sha256:
            files = " and ".join(f"{each.artefact} (SHA-256 {each.sha256[:12]}...)" for each in (before, after))
            lines.append(f"{label}: the files differ: {files}")
    lines += _lines_of_one_run("old", old, {old_index for old_index, _ in matched})
    return lines + _lines_of_one_run("new", new, {new_index for _, new_index in matched})


def _lines_of_one_run(name: str, run: Run, matched: Collection[int]) -> list[str]:
    emulated = [f"the {name} run is EMULATED, no figure of it is the device's"] if run.device.emulated else []
    unmatched = [label for index, label in enumerate(run.labels) if index not in matched]
    return emulated + [f"{label}: in the {name} run only" for label in unmatched]


def _rows(found: Sequence[Change]) -> list[list[str]]:
    rows = [["artefact", "figure", "old", "new", "change", ""]]
    for change in found:
        old, new = (f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}" for value in (change.old, change.new))
        rows.append([change.artefact, change.figure, old, new, f"{100 * change.relative:+.1f} %", change.verdict])
    return rows


def markdown(found: Sequence[Change]) -> str:
    return markdown_table(_rows(found), TEXT_COLUMNS) + "\n"


def print_table(found: Sequence[Change]) -> None:
    print_rows(_rows(found), TEXT_COLUMNS)


def prediction_rows(run: Run, profile: DeviceProfile) -> list[list[str]]:
    """Return the header and one row per test of each artefact, in milliseconds per token by the profile's clock.

    Raises UsageError if the profile has another engine, weight type, number of threads or engine settings.
    """
    clock = profile.measured_on.clock
    table = [["artefact", "test", f"predicted ms ({clock})", "measured ms", "measured / predicted"]]
    for name, result in run.labelled:
        _check_profile(profile, result, name)
        shape = DecoderShape.from_dict(result.manifest["architecture"])
        for test in result.speeds:
            measured = result.quiet_ms(test, clock)
            predicted = _predicted_ms(profile, shape, test)
            table.append([name, test, f"{predicted:.3f}", f"{measured:.3f}", f"{measured / predicted:.3f}"])
    return table


def _check_profile(profile: DeviceProfile, result: Result, name: str) -> None:
    if not result.manifest.get("architecture"):
        raise UsageError(f"--predict: {name} has no manifest with its widths; give a folder of efficientllm-export")
    profile.check(engine=result.engine, quantization=result.quantization, threads=result.threads or None)
    measured_with = profile.measured_on.engine_settings
    if measured_with and result.engine_settings and measured_with != result.engine_settings:
        raise UsageError(
            f"--predict: the profile was measured with {measured_with}, {name} ran with {result.engine_settings}; "
            "give the same --kv-cache"
        )


def _predicted_ms(profile: DeviceProfile, shape: DecoderShape, test: str) -> float:
    """Return the predicted milliseconds per token, for a decode at its mean context."""
    context = mean_context(test)
    if context is not None:
        return profile.decode_ms(shape, math.ceil(context))
    tokens = int(test.removeprefix("pp"))
    return profile.prefill_ms(shape, tokens) / tokens
