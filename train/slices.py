"""Cut a size between two trained sizes of a run, without training.

The slice starts from the next larger trained size and takes the groups that the run removed after it, in the order of
the run, until the wanted size is met. A least-squares fit then restores the residual stream, as after a removal.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..runtime.base.errors import UsageError
from ..runtime.base.files import folder_written_atomically, write_json_atomically
from ..runtime.base.output import locked_output
from .checkpoint.run_folder import FINISHED_FILE, SETTINGS_FILE, SLICES_FOLDER, saved_config
from .compute.distributed import Parallel
from .compute.hardware import choose_hardware
from .compute.loss import TrainingLoss, perplexity
from .config.pruning import PruneConfig, size_target
from .config.sections import QuantisationConfig, TrainConfig
from .data.documents import SELF_CHAT, DataSpec
from .model.architecture import Architecture
from .model.folder_files import read_json
from .model.groups import BLOCKS
from .model.irregular import save_checkpoint
from .model.source import load_source
from .plan import with_self_chats
from .pruning.plan import Budget, device_time, make_budget
from .pruning.pruner import kept_from_json
from .pruning.recovery import LeastSquares, fit_inputs
from .pruning.selection import Kept, Ranking, Removal, SelectionRules, Unit
from .pruning.surgery import remove_groups
from .quantisation.weights import RoundedWeights
from .reporting.metrics import read_metrics
from .request import data_specs
from .run_text import RunText
from .sizes import Member, check_sizes_are_finished, members_of

_log = logging.getLogger("efficientllm.export")

TRAINED_SHARE = 0.99
"""Share of the wanted size from which a trained size is used instead of a slice."""


def model_of_size(run: Path, size: str, quantize: str = "", is_gguf: bool = True) -> Path:
    """Return the folder of the model of a size of a run, and cut it first if the run did not train it.

    `size` is as in --sizes, in any unit. `quantize` is the type of the export, or empty for that of the run. `is_gguf`
    tells whether the export writes a GGUF, whose bytes the run counts. Raises UsageError if the run has no model of at
    most that size or sizes that are not finished, or counts bytes of other files.
    """
    unit = size_unit(size)
    members = members_of(run) if (run / SETTINGS_FILE).is_file() else []
    if not members:
        raise UsageError(
            f"--size {size}: {run} is no finished run; give the --output of efficientllm-train, or omit it"
        )
    kind, _ = members[0].file_types
    exact = next((member for member in members if member.size == size), None)
    if unit == "target_bytes" and not is_gguf:
        if exact is None:
            raise UsageError(f"--size {size}: bytes are those of a GGUF; give the size as a share or in parameters")
        _log.info(f"size {size}: the bytes are those of a GGUF in {kind}")
    elif unit == "target_bytes" and quantize not in ("", kind):
        raise UsageError(
            f"--size {size}: the run counts bytes in {kind}, and {quantize} takes others; use --quantize {kind}, or "
            "give the size as a share or in parameters"
        )
    if exact is not None:
        return exact.folder / "model"
    check_sizes_are_finished(run)
    settings, source = saved_config(run).pruning, Architecture.from_dict(_finished(run)["source"])
    budgets = [_budget(settings, size, source, member) for member in members]
    met = [budget.is_met(member.architecture) for budget, member in zip(budgets, members, strict=True)]
    if not any(met):
        measure = budgets[-1].measure
        shown = measure.describe(measure.of(members[-1].architecture))
        raise UsageError(f"--size {size}: the smallest model of the run has {shown}; give at least that")
    index = met.index(True)
    smaller, budget = members[index], budgets[index]
    if budget.measure.of(smaller.architecture) >= TRAINED_SHARE * budget.target:
        return smaller.folder / "model"
    if index == 0:
        _log.info(f"size {size}: the largest model of the run is smaller, and is exported instead")
        return smaller.folder / "model"
    folder = run / SLICES_FOLDER / size
    with locked_output(folder, "--size"):
        _cut(run, folder, members[index - 1], smaller, budgets[index - 1])
    return folder


def size_unit(size: str) -> str:
    """Return the target field of PruneConfig that a --size sets. Raises UsageError if it is no size."""
    try:
        return size_target(size)[0]
    except ValueError as error:
        raise UsageError(f"--size: {error}") from error


def _finished(run: Path) -> dict[str, Any]:
    return read_json(run / FINISHED_FILE)


def _budget(settings: PruneConfig, size: str, source: Architecture, member: Member) -> Budget:
    """Return the budget of a size, in bytes those of a file with the tokenizer of `member`."""
    name, value = size_target(size)
    if name == "target_bytes":
        return Budget(value, member.file_bytes)
    is_time = name == "target_latency"
    if is_time and settings.device_profile is None:
        raise UsageError(f"--size {size}: the run has no device profile; give a share, parameters or bytes")
    wanted = (settings if is_time else PruneConfig()).of_size(size)
    budget = make_budget(wanted, source, None, 0, device_time(wanted, wanted.device_profile))
    assert budget is not None
    return budget


def select_slice(
    records: Iterable[dict[str, Any]], architecture: Architecture, survivors: Kept, budget: Budget
) -> Removal:
    """Return the removal from a trained size that meets `budget`, in the order of the run's log `records`.

    `survivors` are the groups of the trained size as positions in the source, as in the log. A uniform model stays
    uniform. Raises UsageError if the log ends before the budget is met.
    """
    stays_uniform = architecture.is_uniform
    ranking = Ranking(architecture, {}, SelectionRules(()))
    units = (unit for record in records for unit in record.get("removed", []))
    for kind, layer, positions in units:
        if budget.is_met(ranking.architecture) and (ranking.architecture.is_uniform or not stays_uniform):
            break
        if kind == "vocabulary":  # removed before every size
            continue
        row = layer or 0
        if kind in BLOCKS:
            if BLOCKS[kind].is_in(ranking.architecture, row):
                ranking.take(Unit(kind, ((layer, (0,)),), 0.0, 0.0))
            continue
        kept, wanted = survivors[kind][row], torch.tensor(positions)
        # other units of the log were removed before the trained size, which this slice starts from
        if torch.isin(wanted, kept).all():
            places = torch.searchsorted(kept, wanted)
            ranking.take(Unit(kind, ((layer, tuple(places.tolist())),), 0.0, 0.0))
    if not budget.is_met(ranking.architecture):
        raise UsageError(
            "--size: metrics.jsonl of the run lacks some of its removals; give the size of a trained model"
        )
    return Removal(architecture, ranking.architecture, ranking.kept, ())


def _cut(run: Path, folder: Path, larger: Member, smaller: Member, budget: Budget) -> None:
    """Write the model of `budget`, cut from `larger`, into `folder`. `smaller` is the next trained size."""
    config = saved_config(larger.folder)
    described = _finished(larger.folder)
    source_shape = Architecture.from_dict(described["source"])
    survivors = kept_from_json(described["survivors"], source_shape)
    removal = select_slice(read_metrics(run), larger.architecture, survivors, budget)
    former, tokenizer = load_source(str(larger.folder / "model"))
    model = copy.deepcopy(former)  # the fit compares with the model before the removal
    remove_groups(model, removal)
    hardware = choose_hardware(config.run.device, config.run.dtype, config.run.threads)
    alone = Parallel("ddp", hardware.device)
    data = _data(config, hardware.dtype, alone)
    text = RunText(data, tokenizer, config.source, config.run.seed, num_ranks=1)
    inputs = fit_inputs(text.extra_windows(config.pruning.recover_tokens)).to(alone.device)
    for each in (model, former):
        each.to(alone.device)
    fit = LeastSquares(model, former, removal.kept["stem"][0], config.pruning.recover_damping, hardware.dtype)
    fit.fit(inputs, alone)
    if config.quantisation.is_on:
        _round(model, inputs, config.quantisation)
    loss = TrainingLoss(model, hardware.dtype)
    value = perplexity(loss, text.held_out, config.optimizer.batch_size, alone.device)
    training = larger.training | {
        "parameters": removal.after.num_parameters,
        "perplexity": larger.training["perplexity"] | {"final": value},
        "quality": None,
        "slice_of": larger.size,
    }
    for name in ("latency", "bits_per_byte"):
        training.pop(name, None)
    with folder_written_atomically(folder) as temporary:
        save_checkpoint(model, tokenizer, temporary)
        write_json_atomically(temporary / "training.json", training)
    neighbours = ", ".join(map(_described, (larger, smaller)))
    found = f"cut from {larger.size} without training, held-out perplexity {value:.2f}"
    _log.info(f"size {folder.name}: {found}; trained neighbours: {neighbours}")
    if value >= smaller.training["perplexity"]["final"]:
        _log.warning(f"size {folder.name} predicts no better than the smaller trained {smaller.size}; use that")


def _described(member: Member) -> str:
    """Return size, perplexity and score of a trained size."""
    text = f"{member.size} {member.training['perplexity']['final']:.2f}"
    return f"{text} (score {member.score['score']:.3f})" if member.score else text


@torch.no_grad()
def _round(model: Any, inputs: torch.Tensor, settings: QuantisationConfig) -> None:
    """Round the weights to the type of the run. The inputs [n, S] weight the errors of columns, as in training."""
    rounding = RoundedWeights(settings)
    model.train()  # inputs are observed in training mode only
    with rounding.applied(model):
        model(inputs)
    model.eval()
    rounding.make_permanent(model)


def _data(config: TrainConfig, dtype: torch.dtype, parallel: Parallel) -> tuple[DataSpec, ...]:
    """Return the corpora of a run, with its self-chats."""
    specs = data_specs(config)
    if all(spec.path != SELF_CHAT for spec in specs):
        return specs
    source, source_tokenizer = load_source(config.source.source, "", config.foreign)
    return with_self_chats(config, source, source_tokenizer, dtype, parallel)
