"""The arms of the study: what each changes about the common run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from efficientllm.train.config.sections import TrainConfig
from efficientllm.train.pruning.criteria import uses_gradient

ONE_SHOT_AT = 0.05
"""Share of the tokens at which one-shot pruning happens: until then its saliency is averaged, as long as the
pruning-aware arms average theirs before their first removal."""

Change = Callable[[TrainConfig], TrainConfig]


def _pruning(**changes: object) -> Change:
    return lambda config: replace(config, pruning=replace(config.pruning, **changes))  # type: ignore[arg-type]


def _optimizer(**changes: object) -> Change:
    return lambda config: replace(config, optimizer=replace(config.optimizer, **changes))  # type: ignore[arg-type]


_by_target = _pruning(rank_by="target", block_tokens=1024, block_renewals=2)
_one_shot = _pruning(prune_start=ONE_SHOT_AT, prune_end=ONE_SHOT_AT)
_distilled = _optimizer(distill=1.0)
"""The loss of the peers, as of ours: cross-entropy and distillation from the source."""
_recovered = _pruning(saliency="token-fisher", recover="least-squares")
_in_steps = _pruning(prune_start=0.1, prune_end=0.4, removals=4, recover_tokens=8192)
_unpruned = _pruning(
    prune=("none",), target_params=None, target_latency=None, device_profile=None, workload=None, rank_by="target"
)


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    title: str
    changes: tuple[Change, ...]
    """Applied in order to the common configuration."""
    is_ours: bool = False
    is_repeated: bool = False
    """Whether it runs for every seed."""
    same_for_all_ratios: bool = False
    shape_of: str | None = None
    """Arm whose final shape this one begins with, with random weights."""
    trains: bool = True
    is_for_device: bool = False
    """Whether it ranks by a device's milliseconds, so that it needs a profile."""
    drops_layers: bool = False
    """Whether it prunes towards the source without its best contiguous layers."""

    def configure(self, common: TrainConfig) -> TrainConfig:
        for change in self.changes:
            common = change(common)
        return common


TAYLOR1 = "taylor1"

ARMS: dict[str, Arm] = {
    "source": Arm("source, untouched", (_unpruned,), same_for_all_ratios=True, trains=False),
    "source-trained": Arm("source, same training", (_unpruned,), same_for_all_ratios=True),
    TAYLOR1: Arm("pruning-aware, taylor1", (), is_ours=True, is_repeated=True),
    "one-shot-taylor": Arm("one-shot taylor1, then training", (_one_shot,), is_repeated=True),
    "distill": Arm("pruning-aware, taylor1, distillation", (_distilled,), is_ours=True, is_repeated=True),
    "recover": Arm(
        "pruning at once by token-fisher, least squares, distillation",
        (_recovered, _pruning(prune_start=0.2, prune_end=0.2), _distilled),
        is_ours=True,
        is_repeated=True,
    ),
    "recover-steps": Arm(
        "pruning in steps by token-fisher, least squares after each, distillation",
        (_recovered, _in_steps, _distilled),
        is_ours=True,
        is_repeated=True,
    ),
    "one-shot-fisher": Arm(
        "one-shot fisher, then the same loss", (_one_shot, _pruning(saliency="fisher"), _distilled), is_repeated=True
    ),
    "one-shot-flap": Arm(
        "FLAP's fluctuation, then the same loss", (_one_shot, _pruning(saliency="flap"), _distilled), is_repeated=True
    ),
    "one-shot-wanda": Arm(
        "Wanda, structured, uniform, then the same loss",
        (_one_shot, _pruning(saliency="wanda", layout="uniform"), _distilled),
        is_repeated=True,
    ),
    "one-shot-minitron": Arm(
        "Minitron's activations, uniform, then the same loss",
        (_one_shot, _pruning(saliency="minitron", layout="uniform"), _distilled),
        is_repeated=True,
    ),
    "taylor2": Arm("pruning-aware, taylor2", (_pruning(saliency="taylor2"),), is_ours=True),
    "obs": Arm("pruning-aware, taylor1, OBS update", (_pruning(weight_update="obs"),), is_ours=True),
    "one-shot-magnitude": Arm("one-shot magnitude, then training", (_one_shot, _pruning(saliency="magnitude"))),
    "random": Arm("random groups, removed gradually", (_pruning(saliency="random"),)),
    "uniform": Arm("pruning-aware, taylor1, uniform layout", (_pruning(layout="uniform"),)),
    "recover-uniform": Arm(
        "in steps with least squares, uniform layout, distillation",
        (_recovered, _in_steps, _distilled, _pruning(layout="uniform")),
        is_repeated=True,
    ),
    "latency": Arm(
        "in steps with least squares, by milliseconds, distillation",
        (_recovered, _in_steps, _distilled, _by_target),
        is_ours=True,
        is_repeated=True,
        is_for_device=True,
    ),
    "latency-blocks": Arm(
        "in steps with least squares, by milliseconds, whole blocks, too, distillation",
        (_recovered, _in_steps, _distilled, _by_target, _pruning(prune=("attention", "ffn", "blocks"))),
        is_ours=True,
        is_repeated=True,
        is_for_device=True,
    ),
    "depth": Arm(
        "depth only, best contiguous layers, in steps with least squares, distillation",
        (_recovered, _in_steps, _distilled),
        is_repeated=True,
        drops_layers=True,
    ),
    "scratch": Arm("same shape from scratch", (_unpruned,), shape_of=TAYLOR1),
}
"""In the order they run; every arm sees the same tokens in the same order."""

ONE_SHOT = "one-shot-"


def add_arm(name: str) -> bool:
    """Tell whether there is an arm of this name. one-shot-CRITERION becomes one for every criterion of --saliency."""
    criterion = name.removeprefix(ONE_SHOT)
    if name not in ARMS and criterion != name:
        uses_gradient(criterion)  # UsageError where it is unknown
        changes = (_one_shot, _pruning(saliency=criterion), _distilled)
        ARMS[name] = Arm(f"one-shot {criterion}, then the same loss", changes, is_repeated=True)
    return name in ARMS
