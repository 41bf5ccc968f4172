"""Measure how sure a model is of its calls: what a threshold costs, and how often calls of a probability are right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...runtime.engines.calibration import Calibration
from .job_metrics import calls_in
from .jobs import NO_CALL, JobResult

WRONG_ACTS = (0.01, 0.02, 0.05)
"""Shares of wrong calls among all requests for which a threshold is shown."""

MOST_POINTS, MOST_WRONG = 200, 0.2
"""Number of thresholds that a model stores, and the share of wrong calls of the last but one."""


def calibration(result: JobResult) -> Calibration | None:
    """Return the thresholds and the calibration of a job, None for another metric, a checkpoint or no call at all.

    The calibration is the isotonic regression of right calls on the mean probability. The shares of wrong calls count
    one more than was seen, so that few examples promise little.
    """
    if result.metric != "call" or not any(result.probabilities):
        return None
    probability, is_right, fits = _calls(result)
    # an answer after a result belongs to the request before it
    requests = len(result.answers) - np.count_nonzero(~np.isnan(result.values.get("after_result", [np.nan])))
    if not len(probability) or not requests:
        return None
    acted = np.cumsum(fits) / max(1, sum(each != NO_CALL for each in result.functions))
    wrong = (np.cumsum(~is_right) + 1) / (requests + 1)
    # The threshold lies between two calls: the same call has another rounding in the next process. All pass the last.
    least = (probability + np.append(probability[1:], -probability[-1])) / 2
    ends = np.flatnonzero(least < probability)
    few = ends[wrong[ends] <= MOST_WRONG]
    kept = few[np.linspace(0, len(few) - 1, min(len(few), MOST_POINTS)).round().astype(int)]
    curve = np.transpose([least, acted, wrong])[np.union1d(kept, ends[-1:])].tolist()
    return Calibration(isotonic(probability, is_right), [tuple(row) for row in curve])


def _calls(result: JobResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each answer with calls, the surest first: mean probability, whether it is right, whether one fits."""
    answers = zip(result.answers, result.probabilities, result.values[result.score_name], result.functions, strict=True)
    # a right answer where no function fits has no call
    called = [row for text, *row in answers if row[0] and row[1:] != [1, NO_CALL] and calls_in(text)]
    found = sorted(((sure, score == 1, name != NO_CALL) for sure, score, name in called), reverse=True)
    probability, is_right, fits = zip(*found, strict=True) if found else ((), (), ())
    return np.array(probability, dtype=float), np.array(is_right, dtype=bool), np.array(fits, dtype=bool)


def isotonic(probability: np.ndarray, is_right: np.ndarray) -> list[tuple[float, float]]:
    """Return the corners (probability, share of right calls) of the rising step function with the least square error.

    Adjacent violators are pooled (Ayer et al. 1955). scikit-learn does the same, and is no dependency of `--task`.
    """
    blocks: list[tuple[float, int, float, float]] = []
    """(right calls, calls, least and largest mean probability)."""
    order = np.lexsort((~is_right, probability))
    for sure, right in zip(probability[order].tolist(), is_right[order].tolist(), strict=True):
        block = (float(right), 1, sure, sure)
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
            before = blocks.pop()
            block = (before[0] + block[0], before[1] + block[1], before[2], sure)
        blocks.append(block)
    return [(edge, right / calls) for right, calls, *edges in blocks for edge in dict.fromkeys(edges)]


def calibration_error(result: JobResult) -> float:
    """Return the expected calibration error in ten bins (Naeini et al. 2015), NaN for few calls.

    A half of the calls is predicted by the calibration of the other half.
    """
    probability, is_right, _ = _calls(result)
    if len(probability) < 20:
        return math.nan
    fold = np.random.default_rng(0).permutation(len(probability)) % 2
    predicted = np.empty(len(probability))
    for own in (0, 1):
        points = isotonic(probability[fold != own], is_right[fold != own])
        predicted[fold == own] = np.interp(probability[fold == own], *np.transpose(points))
    bins = np.array_split(np.argsort(predicted, kind="stable"), 10)
    return float(sum(abs((predicted - is_right)[each].sum()) for each in bins) / len(probability))


def _acted_on(least: float, share: float) -> str:
    return f"{share:.3f} (probability {least:.3f})" if share else "none"


def rows(results: Sequence[JobResult]) -> list[list[str]]:
    """Return a row for each of WRONG_ACTS and one of the calibration error if known, with a cell for each result."""
    found = [calibration(each) for each in results]
    if not any(found):
        return []
    table: list[list[str]] = []
    for wrong in WRONG_ACTS:
        points = [each.least(wrong) if each is not None else None for each in found]
        cells = [_acted_on(*point) if point is not None else "" for point in points]
        table.append([f"job, acted on with {wrong:.0%} wrong calls", "fitting requests", *cells])
    pairs = zip(results, found, strict=True)
    errors = [calibration_error(each) if one is not None else math.nan for each, one in pairs]
    if not all(map(math.isnan, errors)):
        cells = ["" if math.isnan(each) else f"{each:.3f}" for each in errors]
        table.append(["job, calibration error", "calls", *cells])
    return table
