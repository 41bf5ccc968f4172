"""The study's page: tables, figures and the JSON they come from."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from efficientllm.runtime.base.files import write_json_atomically, write_text_atomically
from efficientllm.runtime.base.quantities import format_count, markdown_table
from efficientllm.runtime.base.user_cache import commit
from efficientllm.train.compute.hardware import choose_hardware
from efficientllm.train.evaluation.evaluate import Evaluation
from efficientllm.train.model.architecture import Architecture
from efficientllm.train.reporting.plots import plot_architecture

from .arms import ARMS
from .figure import plot_perplexities
from .result import Results, StudyResult, of_arm
from .study import Study, target_parameters

NOTES = "\n<!-- notes -->\n"
"""Text of the page from here on is written by hand and kept."""


def nats_of_arms(results: Results, keep: float) -> dict[str, list[float]]:
    """Return {arm: nats on the study's first text by seed} of the arms that train at a ratio."""
    found = {arm: of_arm(results, arm, keep) for arm, description in ARMS.items() if description.trains}
    return {arm: [result.nats for result in seeds] for arm, seeds in found.items() if seeds}


def _ours(arms: Iterable[str]) -> list[str]:
    """Return our arms, only those that rank by a device if there are any."""
    arms = list(arms)
    return [arm for arm in arms if ARMS[arm].is_for_device] or [arm for arm in arms if ARMS[arm].is_ours]


def _best_shape(results: Results, keep: float) -> Architecture | None:
    """Return the architecture of the first seed of our arm with the lowest mean."""
    nats = nats_of_arms(results, keep)
    best = min(_ours(nats), key=lambda arm: statistics.fmean(nats[arm]), default=None)
    return of_arm(results, best, keep)[0].architecture if best is not None else None


def _over_seeds(values: Sequence[float], digits: int) -> str:
    """Return the mean, and the range if there are several: "2.29 (2.23-2.34)", "-0.10 (-0.20 to 0.00)"."""
    mean, low, high = (f"{of(values):.{digits}f}" for of in (statistics.fmean, min, max))
    between = " to " if low.startswith("-") else "-"
    return mean if len(values) == 1 else f"{mean} ({low}{between}{high})"


def _task_cell(evaluations: Sequence[Evaluation], name: str) -> str:
    """Return the mean over seeds. The error is that of one seed's documents, which seeds share."""
    scores = [evaluation.tasks[name] for evaluation in evaluations]
    error = statistics.fmean(score.stderr() for score in scores)
    return f"{statistics.fmean(score.mean() for score in scores):.3f} ± {error:.3f}"


def _chat_cells(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the nats of the end of a turn, and the number of questions answered right."""
    measured = [evaluation.quality for evaluation in evaluations if evaluation.quality is not None]
    ends = [statistics.fmean(quality.turn_ends) for quality in measured]
    return [_over_seeds(ends, 2), _over_seeds([sum(quality.right) for quality in measured], 0)]


def _untouched(results: Results) -> StudyResult | None:
    """Return the untouched source, if it was measured."""
    return next((result for result in results if not ARMS[result.arm].trains), None)


def table(results: Results, keep: float) -> str:
    """Return a table with one row per arm at a ratio."""
    texts, tasks = list(results[0].perplexities), list(results[0].evaluation.tasks)
    chats = all(result.evaluation.quality is not None and result.evaluation.quality.answers for result in results)
    is_timed = results[0].ms is not None
    untouched = _untouched(results)
    header = ["arm", "seeds", "parameters", *(["predicted ms"] if is_timed else [])]
    header += [*(["nats above the source"] if untouched else []), *[f"{text} ppl" for text in texts]]
    header += ["end of turn", "questions"] if chats else []
    header += [*tasks, "train s", "TFLOP"]
    rows = [header]
    for arm, description in ARMS.items():
        found = of_arm(results, arm, keep)
        if not found:
            continue
        evaluations = [result.evaluation for result in found]
        title = f"**{description.title}**" if description.is_ours else description.title
        perplexities = [_over_seeds([result.perplexities[text] for result in found], 2) for text in texts]
        rows.append(
            [
                title,
                str(len(found)),
                f"{found[0].parameters:,}",
                *([_over_seeds([result.ms or math.nan for result in found], 2)] if is_timed else []),
                *([_over_seeds([result.nats - untouched.nats for result in found], 3)] if untouched else []),
                *perplexities,
                *(_chat_cells(evaluations) if chats else []),
                *[_task_cell(evaluations, task) for task in tasks],
                f"{statistics.fmean(result.seconds for result in found):.0f}",
                f"{found[0].flops / 1e12:.1f}",
            ]
        )
    return markdown_table(rows)


def verdict(results: Results, keep: float) -> str:
    """Return sentences that compare our best arm with the best baseline on the study's first text."""
    text = next(iter(results[0].perplexities))
    nats = {arm: seeds for arm, seeds in nats_of_arms(results, keep).items() if not ARMS[arm].same_for_all_ratios}
    means = {arm: statistics.fmean(values) for arm, values in nats.items()}
    ours = _ours(means)
    others = [arm for arm in means if arm not in ours]
    if not ours or not others:
        return ""
    best, rival = min(ours, key=lambda arm: means[arm]), min(others, key=lambda arm: means[arm])
    is_first = means[best] <= means[rival]
    relation = "our best arm has the lowest perplexity" if is_first else "**a baseline has the lowest perplexity**"
    ours_has, rival_has = (
        f"{statistics.fmean(result.perplexities[text] for result in of_arm(results, arm, keep)):.2f}"
        for arm in (best, rival)
    )
    return (
        f"Of these arms, on {text}, {relation}. Ours has {ours_has}. The best baseline has {rival_has} "
        f"({ARMS[rival].title}). {_significance(nats[best], nats[rival])}"
    )


def _significance(ours: Sequence[float], rivals: Sequence[float]) -> str:
    """Return a sentence with the difference and its standard error over seeds, if both arms have several."""
    if len(ours) < 2 or len(rivals) < 2:
        return "There are too few seeds for an error."
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(rivals) / len(rivals))
    difference = statistics.fmean(rivals) - statistics.fmean(ours)
    return f"The difference is {difference:+.3f} ± {error:.3f} nats over seeds."


def markdown(study: Study, results: Results, folder_name: str) -> str:
    """Return the whole page."""
    config = study.config
    hardware = choose_hardware(config.device, "auto", config.threads)
    chips = platform.machine() if hardware.device.type == "cpu" else ""
    data = ", ".join(Path(path).name for path in config.data)
    measured = results[0].evaluation.perplexity
    commits = " and ".join(sorted({result.commit or "unknown" for result in results}))
    sizes = "".join(f", {name} {value.tokens:,} tokens{value.behind}" for name, value in measured.items())
    parts = [
        "# The study at equal time" if config.device_profile else "# The study",
        "",
        "Written by `python -m research.study`. The figures of every run are in "
        f"[{folder_name}/results.json]({folder_name}/results.json).",
        "",
        f"- All arms start from {config.source}, {format_count(study.source.num_parameters)} parameters. Each trains "
        f"on the same {config.tokens:,} tokens of {data}. The batch is {config.batch_size} x {config.sequence_length}, "
        f"the peak learning rate {config.learning_rate:g}.",
        "- Perplexity is measured on text that no arm trains on: six kinds and chat answers that ship with the "
        f"package{sizes}. *End of turn* is the nats of the token that ends an answer. *Questions* counts right answers "
        "of a hundred.",
        *([f"- Tasks are zero-shot, {config.limit or 'all'} documents each."] if results[0].evaluation.tasks else []),
        "- ± is the standard error over documents. Brackets are the range over seeds. Matrix products are in "
        f"{config.eval_dtype}.",
        f"- Commit {commits}, {hardware.describe()} {chips}".rstrip() + ".",
        *_size_line(study, results),
        "- *Nats above the source* is the mean over those kinds of text. TFLOP counts 6 per parameter and token, and 2 "
        "more per parameter of the source for a teacher.",
        "",
    ]
    for keep in map(float, config.keep):
        if not nats_of_arms(results, keep):
            continue
        of = f"the time of {config.workload}" if config.device_profile else "the non-embedding parameters"
        parts += [f"## {keep - 1:+.0%} of {of}", "", table(results, keep), ""]
        missing = [f"`{arm}`" for arm in config.arms if not of_arm(results, arm, keep) and not ARMS[arm].is_ours]
        if missing:
            parts += [f"Not measured at this size: {', '.join(missing)}.", ""]
        line = verdict(results, keep)
        if line:
            parts += [line, ""]
        parts += [f"![Perplexity of every arm]({folder_name}/perplexity-{keep:g}.png)", ""]
        if _best_shape(results, keep) is not None:
            parts += [f"![Shape of our best arm]({folder_name}/architecture-{keep:g}.png)", ""]
    return "\n".join(parts)


def _size_line(study: Study, results: Results) -> list[str]:
    """Return what is equal for all arms: the parameters, or the time on a device."""
    time = study.time
    if time is None:
        pruned = [result for result in results if result.keep < 1]
        off = [abs(one.parameters / target_parameters(study.source, one.keep) - 1) for one in pruned]
        return [f"- Sizes differ from the target by at most {max(off):.2%}."] if off else []
    errors = ", ".join(f"{error.median:.1%} at depth {error.depth}" for error in time.profile.errors)
    return [
        f"- All arms end at the same predicted time of {time.describe()}. The median error of its profile is {errors}. "
        "Arms rank by parameters unless their name says otherwise."
    ]


def write_report(study: Study, path: Path) -> None:
    """Write the page at `path`, and results.json and figures in a folder of its name beside it."""
    results = study.results()
    if not results:
        return
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    settings = _public({name: value for name, value in asdict(study.config).items() if name != "output"})
    write_json_atomically(
        folder / "results.json",
        {
            "schema_version": 1,
            "commit": commit(),
            "settings": settings,
            "results": [_public(result.summary()) for result in results],
        },
    )
    for keep in map(float, study.config.keep):
        if nats_of_arms(results, keep):
            plot_perplexities(results, keep, folder / f"perplexity-{keep:g}.png")
        if (shape := _best_shape(results, keep)) is not None:
            plot_architecture(study.source, shape, folder / f"architecture-{keep:g}.png")
    _, marker, notes = (path.read_text(encoding="utf-8") if path.is_file() else "").partition(NOTES)
    write_text_atomically(path, markdown(study, results, folder.name) + marker + notes)


def _public(value: Any) -> Any:
    """Return JSON values without the folders of the machine that they are from."""
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items()}
    if isinstance(value, str) and "/" in value:
        name, separator, rest = value.partition("=")
        return f"{name}={Path(rest).name}" if separator else Path(value).name
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
