"""Scores of whole blocks, and the common unit of blocks and groups: expected loss in nats per token.

A block's score is measured (probe.py). A group's saliency is a Taylor estimate. It ranks the groups of one block well,
but its scale depends on the criterion, the batch and the block. The groups of a block therefore share the block's
price: loss(group) = loss(block) * amplitude(group) / sum of the amplitudes of the block's groups. This is exact if the
effects of a block's groups add up. An amplitude is the saliency, or its root if the criterion is an energy (a square of
changes). Shares of first-order saliency are near the cost of removing parts of a block. Shares of energies are a fifth
of it for the cheapest sixth of an FFN (research/log), because a block's energy concentrates in few channels and its
effect saturates.

Prices are measured again as the model changes: all of them `renewals` times while the budget falls, and always the next
block before its removal, again if another block was removed since. No block is removed by a price from before its
neighbours were removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.architecture import Architecture
from .criteria import is_energy
from .groups import BLOCKS, KINDS
from .probe import Absence, BlockProbe, Half
from .running_scores import Scores
from .selection import Unit

HALVES: dict[Half, tuple[str, tuple[str, ...]]] = {
    "attention": ("kv_group", ("kv_group", "query_head")),
    "ffn": ("ffn", ("ffn",)),
}
"""Block of a layer -> (kind that is whole with it, kinds that are scored within it)."""

HALF_OF_BLOCK: dict[str, Half] = {"attention_block": "attention", "ffn_block": "ffn"}


def absence_of(name: str, layer: int) -> Absence:
    """Return the blocks that are absent after the removal of a block of this kind."""
    return tuple((layer, half) for half, (kind, _) in HALVES.items() if kind in BLOCKS[name].takes)


class BlockScores:
    """Last measured price of every block of a model."""

    def __init__(self, names: Sequence[str], saliency: str, num_layers: int, renewals: int, span: float) -> None:
        """Create unmeasured scores for `saliency`, the criterion of the groups.

        `span` is the fall of the budget's measure over the whole run.
        """
        self.names = tuple(names)
        self._is_energy = is_energy(saliency)
        self._interval = span / renewals
        self._losses = {name: torch.zeros(num_layers, dtype=torch.float64) for name in BLOCKS}
        """Nats per token without the block; 0 for absent blocks. All halves are measured, because groups need their
        prices."""
        self._factors = {half: torch.zeros(num_layers, dtype=torch.float64) for half in HALVES}
        """Nats per unit of amplitude in each half of each layer."""
        self._confirmed: set[tuple[str, int]] = set()
        """Blocks measured since the last removal."""
        self._renewed_at: float | None = None
        """The budget's measure when all blocks were last measured."""

    @property
    def next_renewal(self) -> float:
        """Return the value of the budget's measure at which all blocks are measured again."""
        return math.inf if self._renewed_at is None else self._renewed_at - self._interval

    def renew(self, probe: BlockProbe, architecture: Architecture, scores: Scores, size: float) -> None:
        """Measure all blocks and the scale of their groups (a collective call)."""
        wanted = [name for name in BLOCKS if name in self.names or name in HALF_OF_BLOCK]
        keys = [
            (name, layer)
            for name in wanted
            for layer in range(len(architecture.layers))
            if BLOCKS[name].is_in(architecture, layer)
        ]
        for vector in self._losses.values():
            vector.zero_()
        for (name, layer), loss in zip(keys, probe.losses([absence_of(*key) for key in keys]), strict=True):
            self._losses[name][layer] = loss
        for name, half in HALF_OF_BLOCK.items():
            whole, _ = HALVES[half]
            for layer, loss in enumerate(self._losses[name]):
                amplitude = float(self._amplitudes(scores[whole][layer]).sum()) if whole in scores else 0.0
                self._factors[half][layer] = loss / amplitude if amplitude > 0 else 0.0
        self._confirmed, self._renewed_at = set(keys), size

    def keep_at(self, size: float) -> None:
        """Record that the budget's measure fell to `size` without changes to blocks."""
        if self._renewed_at is not None:
            self._renewed_at = size

    def confirm(self, probe: BlockProbe, name: str, layer: int) -> None:
        """Measure one block again (a collective call)."""
        self._losses[name][layer] = probe.losses([absence_of(name, layer)])[0]
        self._confirmed.add((name, layer))

    def is_doubtful(self, unit: Unit, taken: Sequence[Unit] = ()) -> bool:
        """Tell whether a unit is a block that must be measured again before its removal, with `taken` removed."""
        if unit.kind not in BLOCKS:
            return False
        return (unit.kind, unit.layer) not in self._confirmed or any(other.kind in BLOCKS for other in taken)

    def forget(self, units: Sequence[Unit] | None = None) -> None:
        """Require a new measurement of every block.

        Only blocks among the removed `units` count; None means that the model was trained.
        """
        if units is None or any(unit.kind in BLOCKS for unit in units):
            self._confirmed = set()

    def in_nats(self, scores: Scores) -> Scores:
        """Return the scores of groups as expected loss, together with those of the blocks."""
        known = torch.cat([factors[factors > 0] for factors in self._factors.values()])
        typical = float(known.median()) if len(known) else 1.0  # where only the stem is scored, its scale is no matter
        found: Scores = {}
        for name, vectors in scores.items():
            if KINDS[name].is_whole_model:  # in all blocks at once
                found[name] = [self._amplitudes(vector) * typical for vector in vectors]
                continue
            half: Half = next(half for half, (_, kinds) in HALVES.items() if name in kinds)
            pairs = zip(vectors, self._factors[half], strict=True)
            found[name] = [self._amplitudes(vector) * factor for vector, factor in pairs]
        return found | {name: list(self._losses[name].split(1)) for name in self.names}

    def _amplitudes(self, saliency: Tensor) -> Tensor:
        """Return fp64 amplitudes on the CPU."""
        values = saliency.double().cpu()
        return values.clamp(min=0).sqrt() if self._is_energy else values

    def state(self) -> dict[str, Any]:
        """Return tensors and numbers for `load_state`."""
        return {
            "losses": self._losses,
            "factors": self._factors,
            "renewed_at": self._renewed_at,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the values of `state`. Nothing is confirmed between two events."""
        self._losses = {name: vector.cpu() for name, vector in state["losses"].items()}
        self._factors = {half: vector.cpu() for half, vector in state["factors"].items()}
        self._renewed_at = state["renewed_at"]
