"""What an evaluation found: scores of tasks and perplexities of texts, with their errors. Imports no lm-eval."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskResult:
    """A task's score."""

    metric: str
    documents: list[str]
    """Hash of each document, to pair results of several models."""
    values: dict[str, list[float]]
    """Score of every document under each of the task's metrics."""

    def mean(self, metric: str = "") -> float:
        return statistics.fmean(self.values[metric or self.metric])

    def stderr(self, metric: str = "") -> float:
        """Standard error of the mean over documents."""
        values = self.values[metric or self.metric]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan

    def to_dict(self) -> dict[str, Any]:
        scores = {name: {"mean": self.mean(name), "stderr": self.stderr(name)} for name in self.values}
        return {"metric": self.metric, "num_documents": len(self.documents), "scores": scores, "samples": vars(self)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> TaskResult:
        return cls(**value["samples"])
