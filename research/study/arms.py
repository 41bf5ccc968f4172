"""The arms of the study: what each changes about the common run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from efficientllm.runtime.base.errors import UsageError
from efficientllm.train.config.sections import TrainConfig
from efficientllm.train.pruning.criteria import uses_gradient

ONE_SHOT_AT = 0.05
"""Share of the tokens at which one-shot pruning happens: until then its saliency is averaged, as long as the
pruning-aware arms average theirs before their first removal."""

Change = Callable[[TrainConfig], TrainConfig]


def _pruning(**changes: object) -> Change:
    return lambda config: replace(config, pruning=replace(config.pruning, **changes))  # type: ignore[arg-type]


def _distilled(config: TrainConfig) -> TrainConfig:
    """Set the loss of all arms but the unpruned source: cross-entropy and distillation from the source."""
    return replace(config, optimizer=replace(config.optimizer, distill=1.0))


_by_target = _pruning(rank_by="target", block_tokens=1024, block_renewals=2)
_one_shot = _pruning(prune_start=ONE_SHOT_AT, prune_end=ONE_SHOT_AT)
_uniform = _pruning(layout="uniform", width_multiple=1)
"""By single channels: a step takes one in every layer, and 32 of them would be 1.5 % of SmolLM2-135M."""
_fitted = _pruning(recover="least-squares")
_token_fisher = _pruning(saliency="token-fisher")
_in_steps = _pruning(prune_start=0.1, prune_end=0.4, removals=4, recover_tokens=8192)
_ours_in_steps = (_token_fisher, _fitted, _in_steps, _distilled)
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
    same_for_all_ratios: bool = False
    shape_of: str | None = None
    """Arm whose final shape this one begins with, with random weights."""
    is_scaled: bool = False
    """Whether it begins with random weights in the source's proportions."""
    trains: bool = True
    is_for_device: bool = False
    """Whether it ranks by a device's milliseconds, so that it needs a profile."""
    drops_layers: bool = False
    """Whether it prunes towards the source without its best contiguous layers."""

    def configure(self, common: TrainConfig) -> TrainConfig:
        for change in self.changes:
            common = change(common)
        return common


STEPS = "recover-steps"

ARMS: dict[str, Arm] = {
    "source": Arm("source, untouched", (_unpruned,), same_for_all_ratios=True, trains=False),
    "source-trained": Arm("source, trained on the same text", (_unpruned,), same_for_all_ratios=True),
    "continuous": Arm("pruning continuously by token-fisher, distillation", (_token_fisher, _distilled), is_ours=True),
    "recover": Arm(
        "pruning at once by token-fisher, least squares, distillation",
        (_token_fisher, _fitted, _pruning(prune_start=0.2, prune_end=0.2), _distilled),
        is_ours=True,
    ),
    STEPS: Arm(
        "pruning in steps by token-fisher, least squares after each, distillation", _ours_in_steps, is_ours=True
    ),
    "random": Arm("random groups, removed gradually", (_pruning(saliency="random"), _distilled)),
    "recover-uniform": Arm("in steps with least squares, uniform layout, distillation", (*_ours_in_steps, _uniform)),
    "latency-blocks": Arm(
        "in steps with least squares, by milliseconds, whole blocks, too, distillation",
        (*_ours_in_steps, _by_target, _pruning(prune=("attention", "ffn", "blocks"))),
        is_ours=True,
        is_for_device=True,
    ),
    "depth": Arm(
        "depth only, best contiguous layers, in steps with least squares, distillation",
        _ours_in_steps,
        drops_layers=True,
    ),
    "scratch": Arm("shape of ours from random weights, distillation", (_unpruned, _distilled), shape_of=STEPS),
    "scaled": Arm(
        "the source's proportions from random weights, distillation", (_unpruned, _distilled), is_scaled=True
    ),
}
"""In the order they run; every arm sees the same tokens in the same order."""

ONE_SHOT, FIT = "one-shot-", "-fit"
PUBLISHED = {
    "flap": "FLAP's fluctuation",
    "wanda": "Wanda, structured, uniform",
    "minitron": "Minitron's activations, uniform",
}
"""Titles of criteria of other methods."""
UNIFORM = ("wanda", "minitron")
"""Criteria whose scores are compared within a layer only."""


def add_arm(name: str) -> bool:
    """Tell whether there is an arm of this name.

    one-shot-CRITERION becomes one for every criterion of --saliency, and one-shot-CRITERION-fit one that is fitted.
    Raises UsageError for an unknown criterion.
    """
    criterion = name.removeprefix(ONE_SHOT).removesuffix(FIT)
    if name not in ARMS and name.startswith(ONE_SHOT):
        try:
            uses_gradient(criterion)
        except UsageError as error:
            raise UsageError(str(error).replace(f"--saliency {criterion}", f"--arms {name}")) from error
        title = PUBLISHED.get(criterion, f"one-shot {criterion}") + ", least squares" * name.endswith(FIT)
        changes = [_one_shot, _pruning(saliency=criterion), _distilled]
        changes += [_uniform] * (criterion in UNIFORM) + [_fitted] * name.endswith(FIT)
        ARMS[name] = Arm(f"{title}, then the same loss", tuple(changes))
    return name in ARMS


for _criterion in ("token-fisher", "fisher", *PUBLISHED):
    for _fit in ("", FIT):
        add_arm(f"{ONE_SHOT}{_criterion}{_fit}")
