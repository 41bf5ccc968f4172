"""The study of files: one model by pruning and by bits, at equal bytes.

Every point is trained (where it is), exported, measured in llama.cpp against the unquantised source, and timed.
"""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.child import run_python
from efficientllm.runtime.base.errors import ArtefactError
from efficientllm.runtime.base.files import write_json_atomically
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.train.checkpoint.run_folder import is_finished
from efficientllm.train.evaluation.evaluate import MeasureConfig, check
from efficientllm.train.evaluation.quality.contract import measure_quality
from efficientllm.train.evaluation.quality.sets import texts
from efficientllm.train.evaluation.scoring import EngineModel, ScoreCache
from efficientllm.train.run import run_training

from .divergence import divergences
from .points import Point, Recipe

KINDS = ("article", "story")
"""Texts that ship with the package and no run trains on."""

POINTS = (
    *("q8_0", "q5_0", "q4_0", "q4_0+imatrix", "q4_0/q4_0", "q4_0/q4_0+imatrix", "q4_0/q4_0+train", "q4_0/q4_0+qat"),
    *("q4_0/q4_0@70MB+qat", "q4_0/q4_0@62MB", "q4_0/q4_0@62MB+imatrix", "q4_0/q4_0@62MB+qat", "q4_0/q4_0@48MB+qat"),
)

COMMAND = "-m", "efficientllm.runtime.start"
"""Arguments of Python that run a command of a room that training does not import."""


@dataclass(frozen=True)
class FilesConfig:
    """Study of files at equal bytes."""

    source: str = "demo"
    """Model to start from, as --source of efficientllm-train."""
    data: tuple[str, ...] = ("demo:0.7", "self-chat:0.3")
    """Text to train on, PATH[:WEIGHT], repeatable."""
    tokens: int = flags.count(30_720)
    """Tokens that every trained point sees."""
    points: tuple[str, ...] = flags.comma_separated(*POINTS)
    """Files, comma-separated, TYPE[/HEAD][@BYTES][+train | +qat][+imatrix]: @BYTES is pruned to that size, +train and
    +qat see the tokens (pruned files always), +qat on the type's grid, +imatrix rounds by an importance matrix."""
    seeds: int = flags.number(1, at_least=1)
    """Seeds of the trained points."""
    batch_size: int = 2
    """Sequences per step."""
    sequence_length: int = flags.count(256)
    """Tokens per sequence."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    documents: int = flags.number(10, at_least=1)
    """Documents of each kind of text that the KL and the bits per byte are of, at most 10."""
    quality: bool = True
    """Measure chat answers and questions, too: four fifths of the measuring."""
    tasks: tuple[str, ...] = flags.comma_separated("none")
    """Zero-shot tasks, comma-separated, or none."""
    data_dir: str = ""
    """Folder with the tasks' rows, as for efficientllm-eval."""
    limit: int = 100
    """Documents per task; 0: all."""
    rounds: int = flags.number(3, at_least=0)
    """Rounds of efficientllm-bench over all files; 0: no timing."""
    threads: int = 0
    """CPU threads of the measurements; 0: all cores."""
    output: str = "build/files"
    """Folder of the study; started again, it goes on where it stopped."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        for text in self.points:
            try:
                Point.parse(text)
            except ValueError as error:
                flags.require(self, "points", False, str(error), value=text)
        check(self.measures)

    @property
    def measures(self) -> MeasureConfig:
        """The tasks, as efficientllm-eval knows them."""
        return MeasureConfig(tasks=self.tasks, data_dir=self.data_dir, limit=self.limit)

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.source, self.data, self.tokens, self.batch_size, self.sequence_length, self.learning_rate)


@dataclass(frozen=True)
class Job:
    """A point with one seed."""

    point: Point
    seed: int

    @property
    def name(self) -> str:
        return f"{self.point.folder}-s{self.seed}"


class FilesStudy:
    """All points of a configuration and the folder they live in."""

    def __init__(self, config: FilesConfig) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._reference: EngineModel | None = None

    @property
    def jobs(self) -> list[Job]:
        """The first seed of everything first."""
        points = [Point.parse(text) for text in self.config.points]
        return [Job(point, seed) for seed in range(self.config.seeds) for point in points if point.training or not seed]

    def result_path(self, job: Job) -> Path:
        return self.folder / job.name / "result.json"

    def artefact(self, job: Job) -> Path:
        return self.folder / job.name / "gguf"

    def run(self, job: Job) -> None:
        """Train, export and measure one point unless it is done."""
        if self.result_path(job).is_file():
            return
        folder = self.folder / job.name
        source: Path | str = self.config.source
        if job.point.training:
            source = folder / "run"
            if not is_finished(folder / "run"):
                trained = run_training(self.config.recipe.train_config(job.point, str(source), job.seed))
                if trained is None:
                    raise KeyboardInterrupt
        if not self.artefact(job).is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            self._export(str(source), self.artefact(job), *job.point.export_flags)
        write_json_atomically(self.result_path(job), self._measure(job))
        shutil.rmtree(folder / "run" / "model", ignore_errors=True)  # up to 540 MB each; the file stays

    def _export(self, source: str, output: Path, *more: str) -> None:
        """In a process of its own: export is no part of training, and llama.cpp's quantiser may abort."""
        command = [*COMMAND, "export", source, "--target", "gguf", "--output", str(output), *more]
        done = run_python(*command, "--no-verify")  # what a file costs is measured below, not judged
        if done.code:
            raise ArtefactError(f"{output.parent.name}: {done.last_error}")

    @property
    def reference(self) -> EngineModel:
        """The source in fp32."""
        if self._reference is None:
            path = self.folder / "source-f32"
            if not path.is_dir():
                self._export(self.config.source, path, "--quantize", "f32")
            self._reference = self._open(path)
        return self._reference

    def _open(self, path: Path) -> EngineModel:
        # one cache for all: the fastest may be another one for every file
        context = min(1024, Manifest.read(path).context_length)
        return EngineModel(path, EngineOptions(threads=self.config.threads, context=context, kv_cache="f16"))

    def _measure(self, job: Job) -> dict[str, Any]:
        path, documents = self.artefact(job), {kind: texts()[kind][: self.config.documents] for kind in KINDS}
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        model = self._open(path)
        found = divergences(self.reference, model, documents)
        quality = measure_quality(model) if self.config.quality else None
        tasks = {name: self._score(name, model) for name in self.config.measures.task_names}
        model.engine.close()
        return {
            "point": str(job.point),
            "seed": job.seed,
            "file_bytes": (path / "model.gguf").stat().st_size,
            "parameters": manifest["architecture"]["num_parameters"],
            "texts": {kind: each.to_dict() for kind, each in found.items()},
            "bits_per_byte": {kind: each.bits_per_byte for kind, each in found.items()},
            "chat_answers": statistics.fmean(quality.chat_answers) if quality and quality.chat_answers else None,
            "right": sum(quality.right) if quality else None,
            "tasks": tasks,
            "tokens": self.config.tokens if job.point.training else 0,
        }

    def _score(self, task: str, model: EngineModel) -> float:
        from efficientllm.train.evaluation.harness import run_task

        data_dir = Path(self.config.data_dir) if self.config.data_dir else None
        return run_task(task, model, data_dir, self.config.limit, ScoreCache(None)).mean()

    def time(self) -> None:
        """Prefill, decode at depth and peak memory of every file, in turns; see efficientllm-bench."""
        paths = [str(self.artefact(job)) for job in self.jobs if not job.seed and self.artefact(job).is_dir()]
        options = ["--rounds", str(self.config.rounds), "--repetitions", "3", "--depths", "512"]
        options += ["--threads", str(self.config.threads)]
        done = run_python(*COMMAND, "bench", *paths, *options, "--json", str(self.folder / "bench.json"))
        if done.code:
            raise ArtefactError(f"efficientllm-bench: {done.last_error}")

    def results(self) -> list[dict[str, Any]]:
        """Of every finished point, smallest file first."""
        paths = [self.result_path(job) for job in self.jobs]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        return sorted(found, key=lambda each: each["file_bytes"])
