"""Run the measurements that a user asks for on one model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.extras import extra
from ...runtime.base.files import without_nan, write_json_atomically
from ...runtime.engines.engine import EngineOptions
from ..config.sections import check_device
from ..data.documents import DataSpec, check_documents
from .jobs import Constrain, Example, JobResult, check_examples, read_examples, run_job
from .perplexity import WIKITEXT, WIKITEXT_FILE, Perplexity, corpus_documents, measure_perplexity, read_wikitext
from .quality.contract import Quality, Report, measure_quality
from .scoring import EngineModel, EvaluatedModel, LineCache, ScoreCache, fingerprint, is_checkpoint
from .tasks import TASKS, TaskResult, check_names

DIGITS = 16
"""Digits of a model's fingerprint at the start of the names of its caches."""

ANSWERS = "-job.jsonl"
"""End of the name of the cache with a model's answers to --task."""


@dataclass(frozen=True)
class MeasureConfig:
    """Measurements."""

    quality: bool = True
    """Measure perplexity on six kinds of text, chat answers and a hundred questions of fact. They ship with the package
    and no run trains on them."""
    tasks: tuple[str, ...] = flags.comma_separated("none")
    """Zero-shot tasks, comma-separated: arc_challenge, arc_easy, boolq, hellaswag, openbookqa, piqa, winogrande, mmlu,
    or all, or none."""
    data_dir: str = ""
    """Folder with the tasks' rows as JSONL and WikiText-2 as wikitext2_raw_test.txt. Empty: tasks come from the hub."""
    limit: int = flags.number(0, at_least=0)
    """Documents per task (per subject of mmlu). 0: all."""
    text: tuple[str, ...] = ()
    """Text to measure perplexity on, [NAME=]PATH, repeatable: any --data of efficientllm-train (of 'demo' only the
    held-out part), or 'wikitext2' from --data-dir."""
    text_tokens: int = flags.count(0, at_least=0)
    """Tokens of each text to predict. 0: all."""
    document_tokens: int = flags.count(512, at_least=0)
    """First tokens of each document of a text to use. 0: all."""
    task: str = ""
    """Held-out examples of a job to answer and score, a .jsonl or .jsonl.gz of chats, or FILE@JOB for a job of
    several. Nothing else is measured then, unless --text or --tasks ask for it."""
    metric: str = "exact"
    """Score of an answer to --task: exact, json, call, label, contains, chrf, rouge, or python:MODULE:FUNCTION."""
    task_limit: int = flags.number(0, at_least=0)
    """Examples of --task to answer. 0: all."""
    task_tokens: int = flags.count(256, at_least=1)
    """Longest answer to an example of --task, in tokens."""
    constrain: Constrain = "none"
    """With --task: limit calls by a grammar to the `tools` of each example and other answers to its `response_format`
    (schema), and free texts in arguments to words of the request (copy), or texts with `examples` to those in it
    (examples). For exported files."""
    window: int = flags.number(512, at_least=2)
    """Context of a perplexity in tokens. Each token is predicted from the start of its window."""
    min_context: int = flags.number(1, at_least=1)
    """Count only tokens with at least this many before them in their window, such as 256 to measure long text. Windows
    overlap by as many."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        is_within = self.min_context <= self.window
        flags.require(self, "min_context", is_within, f"must be at most the window of {self.window}")
        is_left = not self.document_tokens or self.min_context <= self.document_tokens
        flags.require(self, "min_context", is_left, f"must be at most --document-tokens {self.document_tokens}")
        scores = self.metric != "exact" or bool(self.task_limit) or self.constrain != "none"
        needed = "missing; give the examples that --metric, --task-limit and --constrain are for"
        flags.require(self, "task", bool(self.task) or not scores, needed)
        has_measure = self.quality or bool(self.task_names) or bool(self.text) or bool(self.task)
        flags.require(self, "quality", has_measure, "there is nothing to measure; give --text or --tasks")

    @cached_property
    def examples(self) -> list[Example]:
        """Read the examples of the job, once. Raises UsageError or DataError."""
        return read_examples(self.task, self.task_limit)

    @property
    def task_names(self) -> tuple[str, ...]:
        if self.tasks == ("none",):
            return ()
        return tuple(TASKS) if self.tasks == ("all",) else self.tasks


@dataclass(frozen=True)
class ComputeConfig:
    """Computation."""

    device: str = "auto"
    """Device for Hugging Face folders: auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products for Hugging Face folders."""
    batch_tokens: int = flags.number(2048, at_least=1)
    """Tokens per forward pass for Hugging Face folders, with padding."""
    threads: int = flags.number(0, at_least=0)
    """CPU threads. 0: all cores."""
    context: int = flags.number(0, at_least=0)
    """Context window of an artefact in tokens. 0: the model's own, at most 4096."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        check_device(self)


@dataclass(frozen=True)
class Evaluation:
    """Measurements of one model."""

    model: str
    fingerprint: str
    """SHA-256 over its weights."""
    perplexity: dict[str, Perplexity]
    tasks: dict[str, TaskResult]
    quality: Quality | None = None
    job: JobResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON has them: None for NaN."""
        values = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "perplexity": {name: asdict(value) for name, value in self.perplexity.items()},
            "tasks": {name: value.to_dict() for name, value in self.tasks.items()},
            "quality": asdict(self.quality) if self.quality is not None else None,
            "job": self.job.to_dict() if self.job is not None else None,
        }
        return without_nan(values)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Evaluation:
        """Return the evaluation whose `to_dict` is `value`."""
        return cls(
            value["model"],
            value["fingerprint"],
            {
                name: Perplexity(**{**entry, "stderr": math.nan if entry["stderr"] is None else entry["stderr"]})
                for name, entry in value["perplexity"].items()
            },
            {name: TaskResult.from_dict(entry) for name, entry in value["tasks"].items()},
            Quality(**value["quality"]) if value.get("quality") else None,
            JobResult.from_dict(value["job"]) if value.get("job") else None,
        )


def open_model(path: Path, compute: ComputeConfig) -> EvaluatedModel:
    """Open a Hugging Face folder in torch, or an artefact in the engine that its manifest names."""
    if not is_checkpoint(path):
        return EngineModel(path, EngineOptions(threads=compute.threads, context=compute.context))
    with extra("train"):
        from .torch_model import TorchModel
    return TorchModel.load(path, compute.device, compute.dtype, compute.threads, compute.batch_tokens)


def check(config: MeasureConfig) -> None:
    """Raise UsageError or MissingExtraError for settings that would only fail after hours."""
    check_names(config.task_names)
    if config.task:
        check_examples(config.examples, config.metric, config.constrain)
    data_dir = Path(config.data_dir)
    if config.data_dir and not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir}: no such folder")
    if WIKITEXT in config.text and not (config.data_dir and (data_dir / WIKITEXT_FILE).is_file()):
        raise UsageError(f"--text {WIKITEXT}: --data-dir must be a folder that holds {WIKITEXT_FILE}")
    if config.task_names:
        with extra("eval", "lm-eval"):
            import lm_eval  # noqa: F401
    for text in config.text:
        if text != WIKITEXT:
            check_documents(DataSpec(_name_and_path(text)[1], flag="--text"))
    for name in config.task_names:
        rows = data_dir / TASKS[name].rows
        if config.data_dir and not rows.is_file():
            raise UsageError(f"--data-dir: {rows} is missing; drop {name} from --tasks")


def evaluate(
    path: Path,
    measures: MeasureConfig,
    compute: ComputeConfig,
    cache_folder: Path | None = None,
    report: Report = lambda name, done, total: None,
) -> Evaluation:
    """Measure the model at `path`. A call with the `cache_folder` of an interrupted one continues it."""
    check(measures)
    # A cached score is that of the same weights in the same precision.
    digest = fingerprint(path)
    precision = compute.dtype if is_checkpoint(path) else "engine"

    def cache_path(suffix: str) -> Path | None:
        return cache_folder / f"{digest[:DIGITS]}-{precision}{suffix}" if cache_folder is not None else None

    model = open_model(path, compute)
    quality = None
    if measures.quality and not measures.task:  # a job replaces the contract
        quality = _measure_quality(model, cache_path("-quality.json"), report)
    cache = ScoreCache(cache_path(".jsonl"))
    perplexities: dict[str, Perplexity] = {}
    for name, documents in _texts(model, measures).items():
        advance = partial(report, f"perplexity of {name}")
        perplexities[name] = measure_perplexity(model, documents, measures.window, cache, advance, measures.min_context)
    tasks: dict[str, TaskResult] = {}
    if measures.task_names:
        from .harness import run_task

        data_dir = Path(measures.data_dir) if measures.data_dir else None
        for name in measures.task_names:
            tasks[name] = run_task(name, model, data_dir, measures.limit, cache, partial(report, name))
    job = None
    if measures.task:
        job = run_job(
            model,
            measures.examples,
            measures.metric,
            max_tokens=measures.task_tokens,
            constrain=measures.constrain,
            cache=LineCache(cache_path(ANSWERS)),
            advance=partial(report, "answers"),
        )
    return Evaluation(str(path), digest, perplexities, tasks, quality, job)


def _measure_quality(model: EvaluatedModel, path: Path | None, report: Report) -> Quality:
    """Read the quality of a model from a file, or measure it and write the file."""
    if path is not None and path.is_file():
        return Quality(**json.loads(path.read_text(encoding="utf-8")))
    quality = measure_quality(model, report)
    if path is not None:
        write_json_atomically(path, asdict(quality))
    return quality


def _texts(model: EvaluatedModel, config: MeasureConfig) -> dict[str, list[list[int]]]:
    """Return {name: token ids of its documents} of each --text."""
    texts: dict[str, list[list[int]]] = {}
    for text in config.text:
        if text == WIKITEXT:
            ids = model.tokenize(read_wikitext(Path(config.data_dir) / WIKITEXT_FILE))
            texts[WIKITEXT] = [ids[: config.text_tokens + 1] if config.text_tokens else ids]
        else:
            name, path = _name_and_path(text)
            limits = (config.document_tokens, config.text_tokens, config.min_context)
            texts[name] = corpus_documents(model, path, *limits)
    return texts


def _name_and_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if separator:
        return name, path
    return Path(text).name.split(".")[0], text
