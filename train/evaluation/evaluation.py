"""One model through every measurement asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.extras import extra
from ...runtime.base.files import write_json_atomically
from ...runtime.engines.engine import EngineOptions
from ..data.documents import DataSpec, check_documents
from . import perplexity
from .perplexity import WIKITEXT, WIKITEXT_FILE, Perplexity
from .quality.measure import Quality, Report, measure_quality, silent
from .request_cache import RequestCache
from .results import TaskResult
from .scoring import EngineModel, ScoredModel, fingerprint, is_checkpoint
from .tasks import TASKS, check_names


@dataclass(frozen=True)
class MeasureConfig:
    """what is measured"""

    quality: bool = True
    """Perplexity on six kinds of text, chat answers and a hundred questions of fact, all of which ship with the package
    and are trained on by no run."""
    tasks: tuple[str, ...] = flags.comma_separated("none")
    """Zero-shot tasks, comma-separated, of arc_challenge, arc_easy, boolq, hellaswag, openbookqa, piqa, winogrande and
    mmlu; or all, or none."""
    data_dir: str = ""
    """Folder with the tasks' rows as JSONL and WikiText-2 as wikitext2_raw_test.txt; empty: tasks come from the hub."""
    limit: int = flags.number(0, at_least=0)
    """Documents per task (per subject of mmlu); 0: all."""
    text: tuple[str, ...] = ()
    """Text to measure perplexity on, [NAME=]PATH, repeatable: anything --data of efficientllm-train reads (of 'demo'
    only the held-out part), or 'wikitext2' from --data-dir."""
    text_tokens: int = flags.count(0, at_least=0)
    """Tokens of each text to predict; 0: all."""
    document_tokens: int = flags.count(512, at_least=0)
    """Of each document of a text, its first tokens; 0: all."""
    window: int = flags.number(512, at_least=2)
    """Context of a perplexity: tokens are predicted from the start of their window of this many."""
    min_context: int = flags.number(1, at_least=1)
    """Of a perplexity: only tokens that have as many before them in their window count (256: what a model makes of long
    text); windows overlap by as many."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        is_within = self.min_context <= self.window
        flags.require(self, "min_context", is_within, f"must be at most the window of {self.window}")
        is_left = not self.document_tokens or self.min_context <= self.document_tokens
        flags.require(self, "min_context", is_left, f"leaves nothing of {self.document_tokens} --document-tokens")
        is_something = self.quality or bool(self.task_names) or bool(self.text)
        flags.require(self, "quality", is_something, "give --text or --tasks: nothing else is left to measure")

    @property
    def task_names(self) -> tuple[str, ...]:
        return () if self.tasks == ("none",) else tuple(TASKS) if self.tasks == ("all",) else self.tasks


@dataclass(frozen=True)
class ComputeConfig:
    """how it is computed"""

    device: str = "auto"
    """For Hugging Face folders: auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """For Hugging Face folders: precision of matrix products."""
    batch_tokens: int = flags.number(2048, at_least=1)
    """For Hugging Face folders: tokens per forward pass, padding included."""
    threads: int = flags.number(0, at_least=0)
    """CPU threads; 0: all cores."""
    context: int = 0
    """Context window of an artefact in tokens; 0: the model's own, at most 4096."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model."""

    model: str
    fingerprint: str
    """sha256 over its weights."""
    perplexity: dict[str, Perplexity]
    tasks: dict[str, TaskResult]
    quality: Quality | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "perplexity": {name: value.to_dict() for name, value in self.perplexity.items()},
            "tasks": {name: value.to_dict() for name, value in self.tasks.items()},
            "quality": self.quality.to_dict() if self.quality is not None else None,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Evaluation:
        return cls(
            value["model"],
            value["fingerprint"],
            {name: Perplexity(**entry) for name, entry in value["perplexity"].items()},
            {name: TaskResult.from_dict(entry) for name, entry in value["tasks"].items()},
            Quality.from_dict(value["quality"]) if value.get("quality") else None,
        )


def open_model(path: Path, compute: ComputeConfig) -> ScoredModel:
    """A Hugging Face folder in torch, anything else in the engine its manifest names."""
    if not is_checkpoint(path):
        return EngineModel(path, EngineOptions(threads=compute.threads, context=compute.context))
    with extra("train"):
        from .torch_model import TorchModel
    return TorchModel.load(path, compute.device, compute.dtype, compute.threads, compute.batch_tokens)


def check(config: MeasureConfig) -> None:
    """UsageError or MissingExtraError for what would only fail after hours."""
    check_names(config.task_names)
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
            check_documents(DataSpec(_named(text)[1]))
    for name in config.task_names:
        rows = data_dir / TASKS[name].rows
        if config.data_dir and not rows.is_file():
            raise UsageError(f"--data-dir: {rows} is missing; drop {name} from --tasks")


def evaluate(
    path: Path,
    measures: MeasureConfig,
    compute: ComputeConfig,
    cache_folder: Path | None = None,
    report: Report = silent,
) -> Evaluation:
    """Measure the model at `path`; with a `cache_folder`, a second call goes on where the first was stopped."""
    check(measures)
    digest = fingerprint(path)
    precision = compute.dtype if is_checkpoint(path) else "engine"
    known = f"{digest[:16]}-{precision}"
    cache = RequestCache(cache_folder / f"{known}.jsonl" if cache_folder is not None else None)
    model = open_model(path, compute)
    quality = None
    if measures.quality:
        quality = _quality(model, cache_folder / f"{known}-quality.json" if cache_folder is not None else None, report)
    perplexities: dict[str, Perplexity] = {}
    for name, documents in _texts(model, measures).items():
        what = f"perplexity of {name}"
        perplexities[name] = perplexity.measure(
            model,
            documents,
            measures.window,
            cache,
            lambda done, total, what=what: report(what, done, total),
            measures.min_context,
        )
    tasks: dict[str, TaskResult] = {}
    data_dir = Path(measures.data_dir) if measures.data_dir else None
    for name in measures.task_names:
        from .harness import run_task

        tasks[name] = run_task(
            name, model, data_dir, measures.limit, cache, lambda done, total, name=name: report(name, done, total)
        )
    return Evaluation(str(path), digest, perplexities, tasks, quality)


def _quality(model: ScoredModel, known: Path | None, report: Report) -> Quality:
    """Measured, or what an earlier call left in the file `known`."""
    if known is not None and known.is_file():
        return Quality.from_dict(json.loads(known.read_text(encoding="utf-8")))
    quality = measure_quality(model, report)
    if known is not None:
        write_json_atomically(known, quality.to_dict())
    return quality


def _texts(model: ScoredModel, config: MeasureConfig) -> dict[str, list[list[int]]]:
    """Token ids of each text's documents by its name."""
    texts: dict[str, list[list[int]]] = {}
    for spec in config.text:
        name, path = _named(spec)
        if spec == WIKITEXT:
            ids = model.tokenize(perplexity.read_wikitext(Path(config.data_dir) / WIKITEXT_FILE))
            texts[WIKITEXT] = [ids[: config.text_tokens + 1] if config.text_tokens else ids]
            continue
        limits = (config.document_tokens, config.text_tokens, config.min_context)
        texts[name] = perplexity.corpus_documents(model, path, *limits)
    return texts


def _named(text: str) -> tuple[str, str]:
    """(name, path) of a --text."""
    name, separator, path = text.partition("=")
    return (name, path) if separator else (Path(text).name.split(".")[0], text)
