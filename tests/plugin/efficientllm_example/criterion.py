"""`--saliency fourth-power` prefers groups with few large weights, and `largest-mean` sees activations."""

from __future__ import annotations

from efficientllm.train.pruning.criteria import ActivationCriterion, Criterion

FOURTH_POWER = Criterion(lambda weight, gradient: (weight.square().square(),), lambda sums: sums, uses_gradient=False)
SECOND_ORDER = Criterion(lambda w, g: (g * w, (g * w).square()), lambda a, b: (a - 0.5 * b).abs(), per_microbatch=True)
LARGEST_MEAN = ActivationCriterion(lambda inputs, weight: (inputs.total / inputs.count).abs() * weight.abs().amax(0))
