"""Saliency of a group as the Fisher information of a gate before it (`--saliency token-fisher`).

For an input channel c of o_proj or down_proj, x_tc at token t, and the gradient of the loss g_tc there, closing a gate
on a head (its D channels together) or on an FFN channel changes the loss by about 1/2 sum_t (sum_c g_tc x_tc)^2 (Fisher
pruning: Theis et al. 2018, arXiv 1801.05787, eq. 7, with every token as a sample). `fisher` forms the same square over
a whole microbatch, of which a step has few. The tokens of a step are hundreds of samples, so this ranking has much less
noise: a one-shot removal with a fit ends at 0.41 nats instead of 0.49 (research/log). A stem channel has a gate after
every norm that reads it. Its score is the square of the sum of their roots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from ..compute.ranks import MeanOverRanks, alone
from ..model.architecture import Architecture
from .criteria import TOKEN_FISHER
from .readers import ReaderScores, is_attention


class GateScores(ReaderScores):
    """Scores by the Fisher information of gates.

    It keeps the inputs of o_proj and down_proj until their backward pass, also under activation checkpointing, which
    would drop them.
    """

    sees_stem = True

    def __init__(
        self,
        kinds: Iterable[str],
        architecture: Architecture,
        decay: float,
        mean_over_ranks: MeanOverRanks = alone,
    ) -> None:
        super().__init__(TOKEN_FISHER, kinds, architecture, decay, mean_over_ranks)
        self._squares: dict[str, Tensor] = {}

    def look(self, name: str, inputs: Tensor) -> None:
        if inputs.requires_grad:
            inputs.register_hook(self._gradient_observer(name, inputs.detach()))

    def _gradient_observer(self, name: str, inputs: Tensor) -> Callable[[Tensor], None]:
        def observe(gradient: Tensor) -> None:
            changes = gradient.float() * inputs.float()  # of the loss, by closing a channel at a token [..., C]
            changes = self.per_head(changes) if is_attention(name) else changes
            squares = changes.flatten(0, -2).square().sum(0)
            self._squares[name] = self._squares[name] + squares if name in self._squares else squares

        return observe

    def sums(self) -> dict[str, Tensor]:
        squares, self._squares = self._squares, {}
        return squares

    def discard_step(self) -> None:
        self._squares = {}
