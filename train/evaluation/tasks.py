"""The paper's eight zero-shot tasks, as lm-evaluation-harness defines them, and their results.

Rows are read from local JSONL or from the hub. Importing this module imports no lm-eval.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ...runtime.base.errors import DataError
from ...runtime.base.extras import extra
from ...runtime.base.quantities import unknown_name
from .scoring import mean_and_error


@dataclass(frozen=True)
class TaskFile:
    """Location of a task's definition in lm-eval and of its rows in a data folder."""

    definition: str
    rows: str
    metric: str
    """Metric shown in tables. It is acc_norm for tasks whose choices differ in length, as is usual."""


TASKS = {
    "arc_challenge": TaskFile("arc/arc_challenge.yaml", "arc_challenge_test.jsonl", "acc_norm"),
    "arc_easy": TaskFile("arc/arc_easy.yaml", "arc_easy_test.jsonl", "acc"),
    "boolq": TaskFile("super_glue/boolq/default.yaml", "boolq_validation.jsonl", "acc"),
    "hellaswag": TaskFile("hellaswag/hellaswag.yaml", "hellaswag_validation.jsonl", "acc_norm"),
    "openbookqa": TaskFile("openbookqa/openbookqa.yaml", "openbookqa_test.jsonl", "acc_norm"),
    "piqa": TaskFile("piqa/piqa.yaml", "piqa_validation.jsonl", "acc_norm"),
    "winogrande": TaskFile("winogrande/default.yaml", "winogrande_xl_validation.jsonl", "acc"),
    "mmlu": TaskFile("mmlu/default", "mmlu_test.jsonl", "acc"),
}
"""Zero-shot tasks of EfficientLLM's tables."""


@dataclass(frozen=True)
class TaskResult:
    """Scores of a task."""

    metric: str
    documents: list[str]
    """Hash of each document, to pair results of several models."""
    values: dict[str, list[float]]
    """Score of every document under each of the task's metrics."""

    def mean(self, metric: str = "") -> float:
        """Return the mean over documents, of the task's own metric by default."""
        return statistics.fmean(self.values[metric or self.metric])

    def stderr(self, metric: str = "") -> float:
        """Return the standard error of `mean`."""
        return mean_and_error(self.values[metric or self.metric])[1]

    def to_dict(self) -> dict[str, Any]:
        scores = {name: {"mean": self.mean(name), "stderr": self.stderr(name)} for name in self.values}
        return {"metric": self.metric, "num_documents": len(self.documents), "scores": scores, "samples": vars(self)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> TaskResult:
        return cls(**value["samples"])


def check_names(names: Sequence[str]) -> None:
    """Raise UsageError for the first unknown task."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise unknown_name("--tasks", unknown[0], (*TASKS, "all", "none"))


@contextmanager
def open_task(name: str, data_dir: Path | None) -> Iterator[dict[str, Any]]:
    """Yield {name: zero-shot lm-eval task} of a task, which for mmlu are 57.

    Rows come from the hub if `data_dir` is None. Raises DataError for missing or malformed rows.
    """
    with extra("eval", "lm-eval"):
        from lm_eval.tasks import TaskManager
    with tempfile.TemporaryDirectory(prefix="efficientllm-") as temporary:
        folder = Path(temporary)
        if data_dir is None:
            manager, wanted = TaskManager(), [name]
        else:
            wanted = _write_definitions(name, data_dir, folder)
            manager = TaskManager(include_path=str(folder), include_defaults=False)
        loaded: Any = manager.load(wanted)
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
        yield loaded["tasks"]


def _write_definitions(name: str, data_dir: Path, folder: Path) -> list[str]:
    """Write task files that include lm-eval's own and read local rows. Returns the task names."""
    task = TASKS[name]
    rows = _read_rows(data_dir / task.rows)
    root = Path(str(resources.files("lm_eval.tasks")))
    if name != "mmlu":
        # HellaSwag's rows may be raw, or the output of lm-eval's process_docs
        changes = {"process_docs": None, "doc_to_target": "gold"} if "gold" in rows[0] else {}
        _write_definition(folder, name, root / task.definition, rows, changes)
        return [name]
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_subject.setdefault(row["subject"], []).append(row)
    for subject, part in by_subject.items():
        definition = root / task.definition / f"mmlu_{subject}.yaml"
        _write_definition(folder, f"mmlu_{subject}", definition, part, {"fewshot_split": None, "fewshot_config": None})
    return [f"mmlu_{subject}" for subject in by_subject]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"--data-dir: {path} is missing; leave --data-dir out to read tasks from the hub") from error
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise DataError(f"--data-dir: {path} is not JSON lines: {error}") from error
    if not rows:
        raise DataError(f"--data-dir: {path} is empty")
    return rows


def _write_definition(folder: Path, name: str, base: Path, rows: list[dict[str, Any]], changes: dict[str, Any]) -> None:
    """Write a task definition as JSON. JSON is YAML, so lm-eval reads it and resolves `include`."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    definition = {
        "include": str(base),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "tag": None,
        **changes,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(definition, indent=1), encoding="utf-8")
