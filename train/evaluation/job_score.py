"""Store the score of a job with the model that it describes.

A score is a JSON object: task and task_sha256 (the file of examples), metric, constrain, examples, score (the name of
the first value), values {name: {mean, stderr}}, source {model, mean, stderr, difference, difference_stderr} or null,
ms_per_answer, tokens_per_answer, measured_on. Its job is the name that the model has for it, or empty. The calls of an
exported file also have a calibration (see `Calibration`). The standard errors of a single example are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...runtime.base.errors import ModelError, UsageError
from ...runtime.base.files import sha256_of, write_json_atomically, write_text_atomically
from ...runtime.base.quantities import display_name
from ...runtime.doctor import cpu
from ...runtime.engines.contract_text import with_jobs
from ...runtime.engines.manifest import JOB_FILE, MANIFEST_NAME, Manifest
from ..data.documents import split_job
from .confidence import calibration
from .evaluate import ComputeConfig, Evaluation, MeasureConfig
from .jobs import JobResult
from .scoring import is_checkpoint

CARD = "README.md"

IDENTITY = ("task_sha256", "job", "examples", "metric", "constrain", "measured_on")
"""Fields of a score that a later measurement of the same kind shares and replaces."""


def check_target(path: Path) -> None:
    """Raise UsageError if a score cannot be stored at `path`, before anything is measured."""
    if not (path / MANIFEST_NAME).is_file() and not is_checkpoint(path):
        raise UsageError(f"--write: {path} is no model folder and no folder written by efficientllm-export")


def job_score(
    evaluation: Evaluation, source: Evaluation | None, measures: MeasureConfig, compute: ComputeConfig
) -> dict[str, Any]:
    """Return the score of an evaluation's job as a JSON object, with that of its source if there is one."""
    (examples, name_of_job), job = split_job(measures.task, "--task"), evaluation.job
    task = Path(examples)
    assert job is not None
    name, beside = job.score_name, None
    if source is not None and source.job is not None:
        difference, error = source.job.difference(job, name)
        beside = {"model": display_name(source.model), **_mean_and_error(source.job, name)}
        beside |= {"difference": difference, "difference_stderr": _known(error)}
    values = {each: _mean_and_error(job, each) for each in job.values if not math.isnan(job.mean(each))}
    values |= {each: {"mean": value, "stderr": None} for each, value in job.whole.items()}
    path = Path(evaluation.model)
    engine, sure = f"torch {compute.dtype}", calibration(job)
    if (path / MANIFEST_NAME).is_file():
        manifest = Manifest.read(path)
        engine = f"{manifest.engine} {manifest.quantization}"
    machine = f"{compute.threads or 'all'} threads of {cpu()['model']}"
    if compute.device.startswith("cuda"):
        machine = compute.device
    return {
        "task": task.name,
        "task_sha256": sha256_of(task),
        "job": name_of_job,
        "metric": measures.metric,
        "constrain": measures.constrain,
        "examples": len(job.answers),
        "score": name,
        "values": values,
        "source": beside,
        "ms_per_answer": job.ms_per_answer,
        "tokens_per_answer": job.tokens_per_answer,
        "measured_on": f"{engine}, {machine}",
        **({"calibration": asdict(sure)} if sure is not None else {}),
    }


def _mean_and_error(job: JobResult, name: str) -> dict[str, float | None]:
    return {"mean": job.mean(name), "stderr": _known(job.stderr(name))}


def _known(value: float) -> float | None:
    """Return None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def write_score(path: Path, score: Mapping[str, Any]) -> None:
    """Add a score to the manifest of an artefact, or to a checkpoint's job.json and model card.

    It replaces a score of the same examples, metric and engine. Each file is replaced atomically.
    """
    if (path / MANIFEST_NAME).is_file():
        manifest = Manifest.read(path)
        replace(manifest, jobs=tuple(_with(manifest.jobs, score))).write(path)
        return
    scores = _with(stored_scores(path), score)
    write_json_atomically(path / JOB_FILE, {"jobs": scores})
    card = path / CARD
    if card.is_file():
        write_text_atomically(card, with_jobs(card.read_text(encoding="utf-8"), scores))


def stored_scores(folder: Path) -> list[dict[str, Any]]:
    """Return the scores of a checkpoint's job.json, [] without one. Raises ModelError if it is damaged."""
    path = folder / JOB_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))["jobs"] if path.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} holds no scores ({error}); delete it") from error


def _with(scores: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Any]:
    kept = [each for each in scores if any(each.get(name, "") != new[name] for name in IDENTITY)]
    return [*kept, new]
