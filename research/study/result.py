"""What one job of the study found, on disk as result.json."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientllm.runtime.engines.contract_text import ALL_TEXTS
from efficientllm.train.evaluation.evaluate import Evaluation
from efficientllm.train.model.architecture import Architecture

from .arms import ARMS, add_arm


@dataclass(frozen=True)
class StudyResult:
    """One arm at one ratio with one seed."""

    arm: str
    keep: float
    """Share of the non-embedding parameters; 1.0 for an arm that prunes nothing."""
    seed: int
    parameters: int
    evaluation: Evaluation
    tokens: int = 0
    """Trained on; 0 for the untouched source, as the next two."""
    seconds: float = 0.0
    flops: float = 0.0
    architecture: Architecture | None = None
    """Final shape of a trained arm."""
    ms: float | None = None
    """Predicted, of the workload on the profiled device, where the study has one."""
    commit: str | None = None
    """Version of the code that measured it."""

    @property
    def perplexities(self) -> dict[str, float]:
        """Return {text: perplexity}, with the geometric mean over the kinds of untrained text first."""
        found: dict[str, float] = {}
        if (quality := self.evaluation.quality) is not None:
            found[ALL_TEXTS] = math.exp(quality.nats)
            if quality.chat_answers:
                found["chat answers"] = math.exp(statistics.fmean(quality.chat_answers))
        return found | {name: value.perplexity for name, value in self.evaluation.perplexity.items()}

    @property
    def nats(self) -> float:
        """Of the first of `perplexities`."""
        return math.log(next(iter(self.perplexities.values())))

    def to_dict(self) -> dict[str, Any]:
        """JSON values, per-document scores included."""
        shape = self.architecture.to_dict() if self.architecture is not None else None
        return vars(self) | {"evaluation": self.evaluation.to_dict(), "architecture": shape}

    def summary(self) -> dict[str, Any]:
        """`to_dict` without scores of documents: what the page's JSON holds."""
        evaluation = self.evaluation.to_dict()
        tasks = {name: {k: v for k, v in task.items() if k != "samples"} for name, task in evaluation["tasks"].items()}
        return self.to_dict() | {"evaluation": evaluation | {"tasks": tasks}}

    @classmethod
    def read(cls, path: Path) -> StudyResult:
        """Read what `to_dict` gave."""
        values = json.loads(path.read_text(encoding="utf-8"))
        shape = values.get("architecture")
        values["architecture"] = Architecture.from_dict(shape) if shape is not None else None
        values["evaluation"] = Evaluation.from_dict(values["evaluation"])
        add_arm(values["arm"])
        return cls(**values)


Results = Sequence[StudyResult]


def of_arm(results: Results, arm: str, keep: float) -> list[StudyResult]:
    """Return every seed of an arm at a ratio (or of an arm that is equal at all ratios)."""
    wanted = 1.0 if ARMS[arm].same_for_all_ratios else keep
    return [one for one in results if (one.arm, one.keep) == (arm, wanted)]
