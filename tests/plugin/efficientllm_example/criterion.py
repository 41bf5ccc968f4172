"""`--saliency fourth-power`: what a sum of squares says, with more weight on the few large weights of a group."""

from __future__ import annotations

from efficientllm.train.pruning.criteria import Criterion

FOURTH_POWER = Criterion(lambda weight, gradient: (weight.square().square(),), lambda sums: sums, uses_gradient=False)
