"""Check a run's configuration before torch is imported and a model is loaded."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.model_names import check_adapter, check_source
from ...runtime.base.output import check_output, check_place
from ...runtime.chat_template import read_template_file
from ...runtime.latency.profile import DeviceProfile
from ..checkpoint.run_folder import SETTINGS_FILE, foreign_files, holds_only_killed_writes, saved_config
from ..config.pruning import PruneConfig
from ..config.sections import GGUF_TYPES, TrainConfig
from ..data.chat import ChatFormat, check_answers
from ..data.documents import SELF_CHAT, DataSpec, check_documents, check_held_out, require_readers, split_job
from ..evaluation.jobs import check_examples, read_examples
from ..model.architecture import Architecture
from ..model.foreign_configs import known_shape
from ..pruning.budget import check_smallest_size
from ..pruning.criteria import uses_gradient
from ..reporting.metrics import check_tensorboard


def data_specs(config: TrainConfig) -> tuple[DataSpec, ...]:
    """Return the corpora of a run."""
    settings = config.source
    return tuple(DataSpec.parse(text, settings.skip_bad_lines, settings.text_field) for text in settings.data)


def check_text(config: TrainConfig) -> None:
    """Read the first documents of every local corpus, and score the answers that --task expects.

    Raises UsageError, DataError or MissingExtraError.
    """
    specs = [spec for spec in data_specs(config) if spec.path != SELF_CHAT]
    for spec in specs:
        check_documents(spec)
    if config.score.task:
        check_examples(read_examples(config.score.task, config.score.task_limit), config.score.metric)
    for spec in specs:
        check_held_out(spec, config.source.held_out_fraction)


def with_resume(config: TrainConfig) -> TrainConfig:
    """Return the configuration with --resume if --resume-or-start finds a run in --output.

    It then also has the folders that the run is of and started in.
    """
    folder = Path(config.run.output)
    if not (config.run.resume or config.run.resume_or_start) or not (folder / SETTINGS_FILE).is_file():
        return config
    saved = saved_config(folder).run
    return replace(config, run=replace(config.run, resume=True, branch_of=saved.branch_of, started_in=saved.started_in))


def in_its_folder(config: TrainConfig) -> TrainConfig:
    """Go to the folder that a resumed run was started in, and return its configuration there."""
    folder = Path(config.run.output).resolve()
    home = folder / config.run.started_in
    if not (config.run.resume and config.run.started_in and home.is_dir()) or home.samefile("."):
        return config
    os.chdir(home)
    return replace(config, run=replace(config.run, output=str(folder)))


def check_request(config: TrainConfig) -> None:
    """Check everything that needs no loaded model. Raises UsageError."""
    if not config.run.output:
        raise UsageError("--output is missing; name a folder for the run")
    if not config.source.data:
        raise UsageError("--data is missing; give your examples, such as train.jsonl")
    check_source(config.source.source, f"--source {config.source.source}")
    teacher = config.optimizer.teacher if config.optimizer.teacher != "source" else ""
    if teacher:
        check_source(teacher, f"--teacher {teacher}")
    if config.source.chat_template:
        template = read_template_file(config.source.chat_template)
        check_answers(ChatFormat.of(template, "<s>", "</s>"))
    for spec in data_specs(config):
        require_readers(spec)
    adapter = config.foreign.adapter
    if adapter:
        check_adapter(adapter)
    if config.score.task and not Path(split_job(config.score.task, "--task")[0]).is_file():
        raise UsageError(f"--task {config.score.task}: no such file; give a .jsonl file of chats")
    if config.score.task and not config.pruning.prunes:
        raise UsageError(f"--task {config.score.task}: a run without pruning is scored by efficientllm-eval; omit it")
    if config.pruning.sizes:
        _check_sizes(config)
    _check_target(config.pruning.of_smallest_size)
    check_removals(config)
    shape = config.pruning.target_architecture
    if shape and not Path(shape).is_file():
        raise UsageError(f"--target-architecture {shape}: no such file; give a run's architecture.json")
    for profile in filter(None, (config.pruning.device_profile, config.pruning.ranking_profile)):
        DeviceProfile.load(Path(profile))
    if config.pruning.device_profile and config.quantisation.is_on:
        engine, quantization = config.quantisation.export_format
        DeviceProfile.load(Path(config.pruning.device_profile)).check(engine=engine, quantization=quantization)
    uses_gradient(config.pruning.saliency)  # UsageError where it is unknown
    known = known_shape(config.source.source)
    if known is not None:
        check_shape(config, *known)
        check_smallest_size(pruning_settings(config), known[0])
    check_tensorboard(config.run.tensorboard)
    folder = Path(config.run.output)
    replaceable = config.run.overwrite or config.run.resume or holds_only_killed_writes(folder)
    inputs = [config.source.source, *(spec.path for spec in data_specs(config))]
    pruning, template = config.pruning, config.source.chat_template
    others = (template, pruning.target_architecture, pruning.device_profile, pruning.ranking_profile, adapter, teacher)
    inputs += filter(None, others)
    remedy = "give --overwrite to replace it or --resume to continue it"
    # a resumed run leaves alone what is not a run's
    foreign = foreign_files if config.run.overwrite else lambda folder: []
    check_output(folder, replaceable, foreign, inputs, remedy)
    check_place(folder, is_renamed=False)


def pruning_settings(config: TrainConfig) -> PruneConfig:
    """Return the pruning settings with the type of --qat for --target-bytes. Raises UsageError for a conflict."""
    settings, shipped = config.pruning, config.quantisation
    if settings.of_smallest_size.target_bytes is None or shipped.qat not in GGUF_TYPES:
        return settings
    for name, trained in (("quantize", shipped.qat), ("output_type", shipped.head_type)):
        asked = getattr(settings, name)
        if asked not in ("", trained):
            raise UsageError(f"{flags.flag_name(name)} {asked}: the run trains for {trained}; omit it")
    return replace(settings, quantize=shipped.qat, output_type=shipped.head_type)


def check_shape(config: TrainConfig, architecture: Architecture, context: int | None) -> None:
    """Raise UsageError for settings that a source of this shape and context does not support."""
    length = config.source.sequence_length
    if context is not None and length > context:
        raise UsageError(f"--sequence-length {length}: the source's context is {context} tokens")
    parts, kind = architecture.parts, config.quantisation.qat
    # a GGUF of the family then stores other weights than the checkpoint, so no grid is kept
    if kind in GGUF_TYPES and (parts.norm.takes_mean or parts.scales_embedding or parts.qk_norm == "width"):
        raise UsageError(
            f"--qat {kind}: a GGUF of {architecture.family} stores rescaled weights, which are not on the grid; "
            "omit it, or use a type of --target onnx or executorch"
        )


def check_removals(config: TrainConfig) -> int:
    """Return how many removals a run has at most. Raises UsageError for fewer steps in their time than --removals."""
    settings, optimizer = config.pruning, config.optimizer
    if not settings.prunes:
        return 0
    batch_tokens = config.source.sequence_length * optimizer.batch_size * optimizer.gradient_accumulation
    step_tokens = batch_tokens * int(os.environ.get("WORLD_SIZE", "1"))
    share = settings.prune_end - settings.prune_start
    steps = share * optimizer.tokens / step_tokens
    if settings.removals - 1 > steps:
        needed = math.ceil((settings.removals - 1) * step_tokens / share)  # flags require a share above 0
        raise UsageError(
            f"--removals {settings.removals}: more than the steps between --prune-start and --prune-end "
            f"({int(steps)}); use fewer, or give at least --tokens {needed}"
        )
    return settings.removals or int(steps / settings.prune_every) + 1


def _check_sizes(config: TrainConfig) -> None:
    """Raise UsageError for settings that leave a larger size nothing to finish with."""
    pruning, optimizer, shown = config.pruning, config.optimizer, ",".join(config.pruning.sizes)
    if optimizer.lr_schedule != "wsd":
        raise UsageError(f"--sizes {shown}: every size decays from the same peak; use --lr-schedule wsd")
    if pruning.prune_end > 1 - optimizer.lr_decay + 1e-9:
        raise UsageError(
            f"--sizes {shown}: the last removal at --prune-end {pruning.prune_end:g} comes after the decay of the "
            f"learning rate has begun; use --prune-end {1 - optimizer.lr_decay:g} or less"
        )
    if config.score.keep_score is not None:
        raise UsageError(f"--sizes {shown}: the sizes are given, and --keep-score finds one; omit it")


def _check_target(settings: PruneConfig) -> None:
    """Raise UsageError for pruning flags without effect, because a target or groups are missing."""
    if settings.targets and settings.prune == ("none",):
        target = flags.flag_name(settings.targets[0])
        raise UsageError(f"--prune none conflicts with {target}; remove one of them")
    if settings.targets or settings.prune == ("none",):
        others = () if settings.target_bytes is not None else ("quantize", "output_type")
        rule = "applies only to --target-bytes; set it"
    else:
        others = tuple(vars(settings))
        rule = "prunes nothing without a target; give --target-ratio 0.8, or --prune none"
    default = PruneConfig()
    for name in others:
        flags.require(settings, name, getattr(settings, name) == getattr(default, name), rule)
