"""Running the study: every arm trained and measured, one after the other; finished ones are not repeated."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.files import write_json_atomically
from efficientllm.runtime.base.quantities import not_one_of
from efficientllm.runtime.base.user_cache import commit
from efficientllm.train.checkpoint.run_folder import is_finished
from efficientllm.train.compute.distributed import Parallel
from efficientllm.train.compute.hardware import choose_hardware
from efficientllm.train.compute.loss import TrainingLoss
from efficientllm.train.config.pruning import PruneConfig
from efficientllm.train.config.sections import OptimizerConfig, RunConfig, SourceConfig, TrainConfig
from efficientllm.train.evaluation.evaluate import ComputeConfig, Evaluation, MeasureConfig, check, evaluate
from efficientllm.train.evaluation.quality.contract import Report
from efficientllm.train.loop.request import data_specs
from efficientllm.train.loop.run_text import RunText
from efficientllm.train.model.architecture import Architecture
from efficientllm.train.model.irregular import build, save_checkpoint
from efficientllm.train.model.source import load_source
from efficientllm.train.pruning.blocks import BlockProbe
from efficientllm.train.pruning.budget import device_time
from efficientllm.train.pruning.measures import DeviceTime
from efficientllm.train.pruning.plan import make_pruning_plan
from efficientllm.train.reporting.metrics import read_metrics
from efficientllm.train.run import run_training

from ..token_law import training_flops
from .arms import ARMS, Arm, add_arm
from .depth import best_contiguous, scaled
from .result import StudyResult


@dataclass(frozen=True)
class StudyConfig:
    """Study."""

    source: str = "demo"
    """Model to start from, as --source of efficientllm-train."""
    data: tuple[str, ...] = ("demo",)
    """Text to train on, PATH[:WEIGHT], repeatable."""
    tokens: int = flags.count(30_720)
    """Tokens each arm sees."""
    keep: tuple[str, ...] = flags.comma_separated("0.8", "0.5")
    """Shares of the non-embedding parameters (of the time, with --device-profile) to keep, comma-separated."""
    device_profile: str = ""
    """Profile of a device, as efficientllm-bench --profile writes it: arms are then equally fast there, and --keep is
    shares of the source's time."""
    workload: str = "depth=512"
    """What is timed there: prompt=256,answer=128 (tokens) a whole answer, depth=512 one token after 512."""
    arms: tuple[str, ...] = flags.comma_separated(*(name for name, arm in ARMS.items() if not arm.is_for_device))
    """Arms to run, comma-separated; latency-blocks, which ranks by milliseconds, needs --device-profile.
    one-shot-CRITERION runs any criterion of --saliency, plug-ins included."""
    seeds: int = flags.number(1, at_least=1)
    """Seeds of every arm that trains."""
    batch_size: int = 4
    """Sequences per step."""
    sequence_length: int = flags.count(256)
    """Tokens per sequence."""
    learning_rate: float = 2e-4
    """Peak learning rate, the same for every arm."""
    width_multiple: int = 32
    """FFN widths stay multiples of this many channels."""
    tasks: tuple[str, ...] = flags.comma_separated("piqa", "hellaswag", "arc_easy")
    """Zero-shot tasks, comma-separated, or none."""
    data_dir: str = ""
    """Folder with the tasks' rows, as for efficientllm-eval."""
    limit: int = 100
    """Documents per task; 0: all."""
    text: tuple[str, ...] = ()
    """Further held-out text, NAME=PATH, repeatable; six kinds of text and chats ship with the package."""
    text_tokens: int = flags.count(8192)
    """Tokens of each text to predict; 0: all."""
    document_tokens: int = flags.count(512)
    """Of each document of a text, its first tokens; 0: all."""
    min_context: int = 1
    """Of --text only tokens that have as many before them count: with 256, what arms make of long text."""
    output: str = "build/study"
    """Folder of the runs; started again, the study goes on where it stopped."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    eval_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of matrix products in measurements."""
    threads: int = 0
    """CPU threads; 0: all cores."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        for name in self.arms:
            flags.require(self, "arms", add_arm(name), not_one_of(name, [*ARMS, "one-shot-CRITERION"]), value=name)
            needs = ARMS[name].is_for_device and not self.device_profile
            flags.require(self, "arms", not needs, "needs --device-profile", value=name)
        for text in self.keep:
            flags.require(self, "keep", 0 < float(text) < 1, "must be between 0 and 1", value=text)
        _ = self.measures

    @property
    def measures(self) -> MeasureConfig:
        names = ("tasks", "data_dir", "limit", "text", "text_tokens", "document_tokens", "min_context")
        return MeasureConfig(**{name: getattr(self, name) for name in names})

    @property
    def compute(self) -> ComputeConfig:
        return ComputeConfig(device=self.device, dtype=self.eval_dtype, threads=self.threads)


@dataclass(frozen=True)
class Job:
    """One arm at one ratio with one seed."""

    arm: str
    keep: float
    """Share of the non-embedding parameters; 1.0 for an arm that prunes nothing."""
    seed: int

    @property
    def name(self) -> str:
        place = "" if self.keep == 1.0 else f"{self.keep:g}/"
        return f"{place}{self.arm}-s{self.seed}"


def jobs(config: StudyConfig) -> list[Job]:
    """Return the jobs of the study, the first seed of everything first."""
    found: list[Job] = []
    for seed in range(config.seeds):
        for index, keep in enumerate(map(float, config.keep)):
            for name in config.arms:
                arm = ARMS[name]
                if (seed and not arm.trains) or (index and arm.same_for_all_ratios):
                    continue
                found.append(Job(name, 1.0 if arm.same_for_all_ratios else keep, seed))
    return found


def target_parameters(source: Architecture, keep: float) -> int:
    """Parameters of a model that keeps this share of the non-embedding ones."""
    copies = 1 if source.tie_word_embeddings else 2
    embedding = copies * source.vocab_size * source.hidden_size
    return embedding + round(keep * (source.num_parameters - embedding))


def _settings(config: StudyConfig) -> dict[str, Any]:
    """Return the settings that distinguish studies, as JSON values. Other settings only add jobs."""
    free = ("output", "device", "threads", "arms", "seeds", "keep")
    return json.loads(json.dumps({name: value for name, value in vars(config).items() if name not in free}))


class Study:
    """All jobs of a configuration and the folder they live in."""

    def __init__(self, config: StudyConfig) -> None:
        check(config.measures)
        self.config = config
        _ = self.time  # UsageError before anything is trained
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        self.source_folder = self.folder / "source"
        if not (self.source_folder / "config.json").is_file():
            model, tokenizer = load_source(config.source)
            save_checkpoint(model, tokenizer, self.source_folder)
        raw = json.loads((self.source_folder / "config.json").read_text(encoding="utf-8"))
        self.source = Architecture.from_hf_config(raw)

    def _check_settings(self) -> None:
        """UsageError where the folder holds another study."""
        path = self.folder / "settings.json"
        settings = _settings(self.config)
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(name for name in settings if settings[name] != before.get(name))
            if changed:
                names = ", ".join(map(flags.flag_name, changed))
                raise UsageError(f"--output {self.folder} holds a study with another {names}; choose another folder")
        write_json_atomically(path, settings)

    def result_path(self, job: Job) -> Path:
        return self.folder / job.name / "result.json"

    def run(self, job: Job, report: Report = lambda name, done, total: None) -> None:
        """Train and measure one job unless it is done."""
        if self.result_path(job).is_file():
            return
        arm = ARMS[job.arm]
        folder = self.folder / job.name
        model = self.source_folder
        if arm.trains:
            trained = self._train(job, arm, folder)
            if trained is None:
                raise KeyboardInterrupt
            model = trained
        folder.mkdir(parents=True, exist_ok=True)
        answers = self.folder / "answers"  # not in the run's: a run that is repeated finds only its own files there
        answers.mkdir(exist_ok=True)
        measured = evaluate(model, self.config.measures, self.config.compute, answers, report)
        write_json_atomically(self.result_path(job), self._result(job, arm, folder, measured).to_dict())
        needed = any(other.shape_of == job.arm for other in ARMS.values()) and job.seed == 0
        if arm.trains and not needed:  # 400 MB each
            shutil.rmtree(folder / "model")

    def _train(self, job: Job, arm: Arm, folder: Path) -> Path | None:
        if is_finished(folder):
            return folder / "model"
        is_begun = (folder / "config.toml").is_file() and (folder / "checkpoints").is_dir()
        return run_training(self.train_config(job, arm, folder, is_begun))

    def train_config(self, job: Job, arm: Arm, folder: Path, resume: bool) -> TrainConfig:
        """Return the configuration of the arm's run."""
        settings = self.config
        source = SourceConfig(
            source=str(self.source_folder),
            data=settings.data,
            sequence_length=settings.sequence_length,
            eval_tokens=settings.sequence_length * settings.batch_size,
        )
        teacher = "source"
        if arm.shape_of is not None or arm.is_scaled:
            source = replace(source, source=str(self._shape_folder(job, arm)), init="random")
            teacher = str(self.source_folder)
        common = TrainConfig(
            source=source,
            pruning=self.common_pruning(job.keep),
            optimizer=OptimizerConfig(
                tokens=settings.tokens, batch_size=settings.batch_size, learning_rate=settings.learning_rate
            ),
            run=RunConfig(
                output=str(folder),
                overwrite=not resume,
                resume=resume,
                quality=False,  # `evaluate` measures it
                device=settings.device,
                threads=settings.threads,
                seed=job.seed,
            ),
        )
        config = arm.configure(common)
        if config.optimizer.distill:
            config = replace(config, optimizer=replace(config.optimizer, teacher=teacher))
        return self._without_best_layers(config) if arm.drops_layers else config

    def _shape_folder(self, job: Job, arm: Arm) -> Path:
        """Return a model folder of the shape that an arm trains from random weights."""
        if arm.shape_of is not None:
            folder = self.folder / Job(arm.shape_of, job.keep, 0).name / "model"
            if not folder.is_dir():
                raise UsageError(f"--arms {job.arm} needs {arm.shape_of}: run that arm first")
            return folder
        folder = self.folder / f"{job.keep:g}" / "scaled"
        if not folder.is_dir():
            model, tokenizer = load_source(str(self.source_folder))
            shape, config = scaled(self.source, target_parameters(self.source, job.keep)), cast(Any, model.config)
            config.update({"hidden_size": shape.hidden_size, "head_dim": shape.head_dim})
            save_checkpoint(build(config, shape), tokenizer, folder)
        return folder

    def common_pruning(self, keep: float) -> PruneConfig:
        """Return the target of every arm, ranked by parameters unless the arm says otherwise."""
        settings = self.config
        if not settings.device_profile:
            target = target_parameters(self.source, keep)
            return PruneConfig(target_params=target, width_multiple=settings.width_multiple)
        return PruneConfig(
            target_latency=f"{keep:g}x",
            device_profile=settings.device_profile,
            workload=settings.workload,
            rank_by="parameters",
            width_multiple=settings.width_multiple,
        )

    def _without_best_layers(self, config: TrainConfig) -> TrainConfig:
        """Return the run that prunes towards the best contiguous layers of the same target."""
        path = Path(config.run.output).with_suffix(".shape.json")
        if not path.is_file():
            plan = make_pruning_plan(config.pruning, self.source, 0)
            assert plan is not None
            model, tokenizer = load_source(str(self.source_folder))
            hardware = choose_hardware(config.run.device, config.run.dtype, config.run.threads)
            parallel = Parallel("ddp", hardware.device)
            loss = TrainingLoss(model.to(hardware.device), hardware.dtype)
            text = RunText(data_specs(config), tokenizer, config.source, config.run.seed, num_ranks=1)
            probe = BlockProbe(
                loss, text.extra_windows(config.pruning.block_tokens), config.optimizer.batch_size, parallel
            )
            shape = best_contiguous(self.source, probe, plan.budget.measure, plan.budget.target)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomically(path, shape.to_dict())
        no_other = PruneConfig(target_architecture=str(path))
        names = ("target_params", "target_latency", "device_profile", "workload", "rank_by", "target_architecture")
        settings = replace(config.pruning, **{name: getattr(no_other, name) for name in names})
        return replace(config, pruning=settings)

    def _result(self, job: Job, arm: Arm, folder: Path, measured: Evaluation) -> StudyResult:
        if not arm.trains:
            ms = self.milliseconds(self.source)
            return StudyResult(
                job.arm, job.keep, job.seed, self.source.num_parameters, measured, ms=ms, commit=commit()
            )
        training = json.loads((folder / "model" / "training.json").read_text(encoding="utf-8"))
        shape = json.loads((folder / "architecture.json").read_text(encoding="utf-8"))
        with_teacher = self.train_config(job, arm, folder, False).optimizer.distill > 0
        initial = training["parameters"] if arm.shape_of or arm.is_scaled else self.source.num_parameters
        return StudyResult(
            job.arm,
            job.keep,
            job.seed,
            training["parameters"],
            measured,
            tokens=training["tokens"],
            seconds=training["seconds"],
            flops=training_flops(read_metrics(folder), initial, self.source, with_teacher),
            architecture=Architecture.from_dict(shape["final"]),
            ms=self.milliseconds(Architecture.from_dict(shape["final"])),
            commit=commit(),
        )

    @functools.cached_property
    def time(self) -> DeviceTime | None:
        """What all arms are equally fast at; None where there is no profile. UsageError where it cannot be read."""
        if not self.config.device_profile:
            return None
        settings = self.common_pruning(1.0)
        return device_time(settings, settings.device_profile)

    def milliseconds(self, architecture: Architecture) -> float | None:
        """Predicted, of the workload on the profiled device; None where there is no profile."""
        return self.time.measure.of(architecture) if self.time is not None else None

    def results(self) -> list[StudyResult]:
        """Every finished job of this configuration, in the order of the jobs."""
        paths = [self.result_path(job) for job in jobs(self.config)]
        return [StudyResult.read(path) for path in paths if path.is_file()]
