"""Saliency criteria: formulas for the score of a group from weights and gradients, or from activations.

A Criterion gives each parameter one or more element-wise terms. The terms are summed in fp32 over the parameters of a
piece of a group. The sums become the piece's score, and the pieces' scores add up to the group's (see saliency.py).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from ...runtime.base.errors import UsageError
from ...runtime.base.quantities import unknown_name

if TYPE_CHECKING:  # a command checks the name of a criterion before it imports torch
    from torch import Tensor

Terms: TypeAlias = "tuple[Tensor, ...]"


@dataclass(frozen=True)
class Criterion:
    """One formula of scores.

    A score is the expected loss of the whole group. The ranking divides it by the group's cost.
    """

    elementwise: Callable[[Tensor, Tensor], Terms]
    """(weight, gradient) -> terms of the same shape, summed over the parameters of a piece of a group."""
    combine: Callable[..., Tensor]
    """(sum of term 1, sum of term 2, ...) -> scores, element-wise. The sums are of a piece of a group (a head's
    channel, a layer's part of a stem channel). A group's score is the sum over its pieces (see saliency.FOLDS)."""
    uses_gradient: bool = True
    per_microbatch: bool = False
    """Whether the terms need each microbatch's own gradient (samples of the empirical Fisher)."""
    combine_each_sample: bool = False
    """Whether `combine` is applied to every sample and its results averaged, instead of to the averaged sums."""
    is_energy: bool = False
    """Whether scores are squares of changes, so that their roots give the groups' shares of a block (see blocks.py).
    False suits scores that are linear in the weights."""


@dataclass
class Moments:
    """Sums over tokens of one matrix's inputs, fp32 [C]."""

    count: int
    total: Tensor
    absolute: Tensor
    squares: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Moments:
        """Compute the sums of inputs [..., C]."""
        x = inputs.detach().flatten(0, -2).float()
        return cls(len(x), x.sum(0), x.abs().sum(0), x.square().sum(0))

    def __add__(self, other: Moments) -> Moments:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Moments(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class ActivationCriterion:
    """One formula of scores from the inputs of o_proj and down_proj. It ranks heads and FFN channels, not the stem."""

    score: Callable[[Moments, Tensor], Tensor]
    """(sums over the tokens of a step, weight [H, C]) -> scores of the C input channels, fp32. A head's score is the
    sum over its channels."""
    is_energy: bool = False
    """True if scores are squares of changes, as in Criterion."""
    uses_gradient: ClassVar[bool] = False


LEAST_FLOAT32 = 2.0**-126
"""Least normal number of fp32. torch, which knows it, is not imported here."""


def _flap(moments: Moments, weight: Tensor) -> Tensor:
    variance = moments.squares / moments.count - (moments.total / moments.count).square()
    # the difference of two nearly equal numbers may round below 0
    scores = variance.clamp(min=0) * weight.square().sum(0)
    # the mean is 0 if the inputs of a matrix never change
    return scores / scores.mean().clamp(min=LEAST_FLOAT32)


CRITERIA: dict[str, Criterion | ActivationCriterion] = {
    # |sum g w|: first-order change of the loss (Molchanov et al. 2019, arXiv 1906.10771, eq. 8 before squaring).
    "taylor1": Criterion(lambda w, g: (g * w,), lambda first: first.abs()),
    # |sum (g w - F w^2 / 2)| with the empirical Fisher diagonal F = E_microbatch[g^2] (LLM-Pruner, arXiv 2305.11627).
    "taylor2": Criterion(
        lambda w, g: (g * w, (g * w).square()), lambda first, second: (first - 0.5 * second).abs(), per_microbatch=True
    ),
    # E_microbatch[(sum g w)^2]: the second-order change for removing the whole channel, with the empirical Fisher for
    # the Hessian, cross terms within the channel included (Molchanov et al. 2019, eq. 8).
    "fisher": Criterion(
        lambda w, g: (g * w,),
        lambda first: first.square(),
        per_microbatch=True,
        combine_each_sample=True,
        is_energy=True,
    ),
    # sum w^2.
    "magnitude": Criterion(lambda w, g: (w.square(),), lambda squares: squares, uses_gradient=False, is_energy=True),
    # var(x_c) |w_c|_2^2, divided by its mean over the matrix (FLAP, arXiv 2312.11983, eq. 5 and 6). The paper's
    # z-scores have negative values, which would invert costs here.
    "flap": ActivationCriterion(_flap, is_energy=True),
    # sqrt(mean x_c^2) |w_c|_1 (Wanda, arXiv 2306.11695, summed over outputs).
    "wanda": ActivationCriterion(lambda x, w: (x.squares / x.count).sqrt() * w.abs().sum(0)),
    # mean |x_c| (Minitron, arXiv 2407.14679, eq. 1 and 2).
    "minitron": ActivationCriterion(lambda x, w: x.absolute / x.count),
}
"""Criteria by name. A program may add its own before it calls `train`."""


ENTRY_POINT_GROUP = "efficientllm.criteria"
"""Entry point group for criteria of installed packages: name = "module:criterion"."""


TOKEN_FISHER = "token-fisher"
RANDOM = "random"
OTHERS = (TOKEN_FISHER, RANDOM)
"""Values of `--saliency` that are no criterion of the registry (see activation.py and running_scores.py)."""


def criterion_named(name: str) -> Criterion | ActivationCriterion:
    """Return a criterion of the registry or of an installed plug-in. Raises UsageError with the known names."""
    plugins = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    for plugin in plugins.select(name=name):
        try:
            criterion = plugin.load()
        except (ImportError, AttributeError) as error:
            raise UsageError(f"--saliency {name}: its plug-in, {plugin.value}, cannot be loaded: {error}") from error
        if not isinstance(criterion, Criterion | ActivationCriterion):
            raise UsageError(f"--saliency {name}: its plug-in, {plugin.value}, is no Criterion or ActivationCriterion")
        return criterion
    if name not in CRITERIA:
        known = [*CRITERIA, *OTHERS, *(plugin.name for plugin in plugins)]
        raise unknown_name("--saliency", name, dict.fromkeys(known))
    return CRITERIA[name]


def uses_gradient(name: str) -> bool:
    """Tell whether `--saliency name` uses gradients. Raises UsageError if it is unknown."""
    return name == TOKEN_FISHER or (name not in OTHERS and criterion_named(name).uses_gradient)


def is_energy(name: str) -> bool:
    """Tell whether the scores of `--saliency name` are squares of changes. Raises UsageError if it is unknown."""
    return name == TOKEN_FISHER or (name not in OTHERS and criterion_named(name).is_energy)
