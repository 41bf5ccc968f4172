"""How often the calls of a model were right on held-out examples, by the probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONSTRAINTS: dict[str, Any] = {"schema": "any", "copy": "copy", "examples": "examples", "listed": "listed"}
"""--constrain of a measurement -> `ToolArguments` of the requests that it holds for."""


@dataclass(frozen=True)
class Calibration:
    """Tells how often calls were right on held-out examples, by `GenerationStats.mean_probability`.

    `train.evaluation.confidence` measures it. Raises ValueError or TypeError for values of another shape.
    """

    points: Sequence[tuple[float, float]]
    """(mean probability, share of right calls), rising."""
    curve: Sequence[tuple[float, float, float]]
    """(least mean probability of a call, share of the requests for calls that are acted on, share of wrong calls among
    all requests, one added to those seen), from the largest probability down. The last one lets all calls pass."""

    def __post_init__(self) -> None:
        points, curve = np.array(self.points), np.array(self.curve)
        if points.shape[1:] != (2,) or curve.shape[1:] != (3,):
            raise ValueError("a calibration has no points")
        if not all(((each >= 0) & (each <= 1)).all() for each in (points, curve)):
            raise ValueError("a calibration has values outside 0 to 1")
        if (np.diff(points, axis=0) < 0).any() or (np.diff(curve[:, 0]) > 0).any():
            raise ValueError("the points of a calibration are not in order")

    def probability(self, mean_probability: float) -> float:
        """Return the probability that calls are right."""
        known, right = zip(*self.points, strict=True)
        return float(np.interp(mean_probability, known, right))

    def least(self, wrong_acts: float) -> tuple[float, float]:
        """Return the least mean probability with at most this share of wrong calls, and the share acted on.

        Without one, it is infinite.
        """
        found = [(least, acted) for least, acted, wrong in self.curve if wrong <= wrong_acts]
        return found[-1] if found else (float("inf"), 0.0)
