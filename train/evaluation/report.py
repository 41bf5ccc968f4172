"""Evaluations as tables: one model, or several side by side with paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ...runtime.base.markdown import markdown_table
from .evaluation import Evaluation
from .results import TaskResult


def _name(evaluation: Evaluation) -> str:
    return Path(evaluation.model).name or evaluation.model


def _score(mean: float, stderr: float) -> str:
    return f"{mean:.3f} ± {stderr:.3f}" if math.isfinite(stderr) else f"{mean:.3f}"


def paired_difference(first: TaskResult, other: TaskResult) -> tuple[float, float, int]:
    """(mean, standard error, n) of other - first over the documents that both hold."""
    before = dict(zip(first.documents, first.values[first.metric], strict=True))
    after = dict(zip(other.documents, other.values[other.metric], strict=True))
    differences = [after[document] - before[document] for document in after if document in before]
    if not differences:
        return math.nan, math.nan, 0
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), error, len(differences)


def rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Header and one row per measure; with several models, the change from the first in each further column."""
    first = evaluations[0]
    table = [["measure", "size", *[_name(evaluation) for evaluation in evaluations]]]
    for name, value in first.perplexity.items():
        cells = []
        for evaluation in evaluations:
            found = evaluation.perplexity[name]
            cells.append(f"{found.perplexity:.2f} ± {found.stderr:.2f} ({found.bits_per_byte:.4f} bits/byte)")
        table.append([f"perplexity, {name}", f"{value.tokens} tokens", *cells])
    for name, result in first.tasks.items():
        cells = [_score(result.mean(), result.stderr())]
        for evaluation in evaluations[1:]:
            other = evaluation.tasks[name]
            difference, error, _ = paired_difference(result, other)
            cells.append(f"{_score(other.mean(), other.stderr())} ({difference:+.3f} ± {error:.3f})")
        table.append([f"{name} ({result.metric})", f"{len(result.documents)} documents", *cells])
    if len(first.tasks) > 1:
        averages = [statistics.fmean(r.mean() for r in evaluation.tasks.values()) for evaluation in evaluations]
        table.append(["average of tasks", "", *[f"{average:.3f}" for average in averages]])
    return table


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """The table with a line that says what ± and brackets are."""
    note = "± is one standard error"
    if len(evaluations) > 1:
        note += f"; in brackets the paired difference from {_name(evaluations[0])}, document by document"
    return f"{markdown_table(rows(evaluations))}\n\n{note}.\n"
