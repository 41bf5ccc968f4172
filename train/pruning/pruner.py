"""Everything about removal in a run: saliency, selection, the weight update, zeroing, and physical removal.

Groups are removed in two stages. `remove` zeroes them (and lets the weight update act); `compact` takes zeroed groups
out of the tensors. The *logical* shape is what remains after the first, the *physical* shape that of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..compute.distributed import Parallel
from ..compute.loss import TrainingLoss
from ..model.architecture import Architecture
from ..model.groups import KINDS
from ..model.irregular import architecture_of
from .blocks import BlockProbe, BlockScores
from .plan import PruningPlan
from .recovery import InputGrams, LeastSquares
from .rows import RowProbe, choose_rows
from .running_scores import Scores
from .selection import Kept, Ranking, Removal, SelectionRules, Unit, all_groups, compose, select_removal
from .surgery import kept_channels, rebuild_sharded, remove_groups, set_survivors, zero_gradients, zero_groups


class Pruner:
    """The removal side of one run."""

    def __init__(self, plan: PruningPlan, model: Any, parallel: Parallel, seed: int) -> None:
        """`model` has the source's shape, or the one that a checkpoint left (then `load_state` follows)."""
        self.plan = plan
        self.settings, self.budget = plan.settings, plan.budget
        self.wants_rows = "vocabulary" in plan.rules.kinds
        """Whether vocabulary rows are still to be chosen: once, before anything else goes."""
        self.model = model
        self.parallel = parallel
        self.physical = architecture_of(model.config)
        self.survivors: Kept = all_groups(plan.source)
        """Surviving groups as positions in the source model."""
        self.pending: Removal | None = None
        """Zeroed but not yet physically removed groups; `before` is the physical shape."""
        self.events_since_compaction = 0
        self.taken: list[Unit] | None = None
        """Units that the event at hand has zeroed so far; None between two events."""
        self.next_saliency: dict[str, float] = {}
        """Score (see selection.Unit) of the unit of each kind that would go next."""
        self.tracker = plan.tracker(self.physical, seed, parallel.mean_tensors)
        self.tracker.attach(model)
        self.grams = self._make_grams() if plan.settings.weight_update == "obs" else None
        self.blocks = self._make_blocks() if plan.settings.measures_blocks else None
        self.is_done = plan.budget.is_met(self.architecture)

    @property
    def rules(self) -> SelectionRules:
        """Return the current rules of removal."""
        rules = self.plan.rules
        if self.wants_rows:
            return rules
        return replace(rules, kinds=tuple(name for name in rules.kinds if name != "vocabulary"))

    def _make_grams(self) -> InputGrams:
        settings = self.settings
        axes = {KINDS[name].axis for name in self.rules.kinds}
        return InputGrams(
            self.model, axes, settings.obs_decay, settings.obs_damping, settings.obs_max_width, settings.obs_rows
        )

    def _make_blocks(self) -> BlockScores:
        source, budget = self.plan.source, self.budget
        span = budget.measure.of(source) - budget.target
        settings = self.settings
        return BlockScores(self.rules.blocks, settings.saliency, len(source.layers), settings.block_renewals, span)

    @property
    def architecture(self) -> Architecture:
        """The logical shape."""
        return self.pending.after if self.pending is not None else self.physical

    @property
    def wants_microbatches(self) -> bool:
        """Whether saliency needs each microbatch's own gradient."""
        return not self.is_done and self.tracker.wants_microbatches

    def observe_gradients(self, sample_weight: float = 1.0) -> None:
        """Add the gradients at hand to the saliency, as a sample of this weight, until the target is reached."""
        if not self.is_done:
            self.tracker.accumulate(self.model.named_parameters(), sample_weight)

    def finish_step(self) -> None:
        """Average the step's saliency in, before the weights change."""
        if not self.is_done:
            self.tracker.finish_step()

    def copy_of_grams(self) -> dict[str, Tensor] | None:
        """Return what `discard_step` takes to forget what a step's forward passes add to the Gram matrices."""
        return self.grams.copies() if self.grams is not None else None

    def discard_step(self, grams: dict[str, Tensor] | None = None) -> None:
        """Forget the saliency of a step, and where they are given, go back to these Gram matrices."""
        self.tracker.discard_step()
        if self.grams is not None and grams is not None:
            self.grams.grams = grams

    def mask_gradients(self) -> None:
        """Keep zeroed groups at zero: drop their gradients."""
        if self.pending is not None:
            zero_gradients(self.model, self.pending)

    def logical_scores(self) -> Scores:
        """Scores of the groups that are still there."""
        if self.pending is None:
            return self.tracker.scores
        return {kind: _those_kept(vectors, self.pending.kept[kind]) for kind, vectors in self.tracker.scores.items()}

    def is_above(self, target: float) -> bool:
        """Whether something is to go for the budget's measure to be at most `target`, and there are scores to go by."""
        return self.tracker.num_observations > 0 and self.budget.measure.of(self.architecture) > target

    def remove_rows(self, rows: RowProbe, probe: BlockProbe | None) -> Removal | None:
        """Let go of the vocabulary rows that the ranking as it is now takes on the way to the whole budget; None where
        it takes none. To be compacted before the model reads on. A collective call.
        """
        scores, shape = self._scores_to_rank_by(probe), self.architecture

        def ahead(of_rows: Tensor) -> Removal:
            return select_removal(shape, scores | {"vocabulary": [of_rows]}, self.rules, self.budget.target)

        found = ahead(choose_rows(rows, lambda of_rows: ahead(of_rows).kept["vocabulary"][0].tolist()))
        self.wants_rows = False
        units = tuple(unit for unit in found.units if unit.kind == "vocabulary")
        if not units:
            return None
        kept = all_groups(shape) | {"vocabulary": found.kept["vocabulary"]}
        removal = Removal(shape, replace(shape, vocab_size=len(kept["vocabulary"][0])), kept, units)
        self.survivors, self.pending = compose(self.survivors, kept), removal
        self.is_done = self.budget.is_met(removal.after)
        if self.blocks is not None:
            self.blocks.keep_at(self.budget.measure.of(removal.after))
        return removal

    def remove(
        self, target: float, optimizer: torch.optim.Optimizer, probe: BlockProbe | None = None
    ) -> Removal | None:
        """Zero the lowest-scored units until the budget's measure is at most `target`; None where nothing goes.

        `probe` measures blocks, where that is wanted; then it is a collective call. Where `probe` raises, the next call
        goes on with the event, in this process or after `load_state`; what it returns then has all units of the event,
        and shapes since it went on.
        """
        if not self.is_above(target):
            return None
        before, kept = self.architecture, all_groups(self.architecture)
        if self.taken is None:
            self.taken = []
            if self.blocks is not None:
                self.blocks.forget()
        while True:
            scores = self._scores_to_rank_by(probe)
            until = target if self.blocks is None else max(target, self.blocks.next_renewal)
            removal = select_removal(self.architecture, scores, self.rules, until, stop_before=self._is_doubtful)
            if removal.units:
                self._zero(removal, optimizer)
                self.taken += removal.units
                kept = compose(kept, removal.kept)
            following = self._next_unit(removal, scores)
            if not self.is_above(target) or following is None:
                break
            self._confirm(following, removal, probe)
        units, self.taken = self.taken, None
        if not units:
            return None
        self.events_since_compaction += 1
        self.is_done = self.budget.is_met(self.architecture)
        return Removal(before, self.architecture, kept, tuple(units))

    def _confirm(self, following: Unit, removal: Removal, probe: BlockProbe | None) -> None:
        """After `removal`, measure what comes next again, if it is a block of which that is to be done."""
        if self.blocks is None:
            return
        self.blocks.forget(removal.units)
        if self.blocks.is_doubtful(following):
            assert probe is not None
            self.blocks.confirm(probe, following.kind, following.layer)

    def _is_doubtful(self, unit: Unit, taken: Sequence[Unit]) -> bool:
        """Whether a unit is a block whose score is to be measured again before it goes."""
        return self.blocks is not None and self.blocks.is_doubtful(unit, taken)

    def _scores_to_rank_by(self, probe: BlockProbe | None) -> Scores:
        """In nats, and with blocks, where blocks are measured; as the tracker has them otherwise."""
        scores = self.logical_scores()
        if self.blocks is None:
            return scores
        size = self.budget.measure.of(self.architecture)
        if size <= self.blocks.next_renewal:
            assert probe is not None
            self.blocks.renew(probe, self.architecture, scores, size)
        return self.blocks.in_nats(scores)

    def _next_unit(self, removal: Removal, scores: Scores) -> Unit | None:
        """What would go after `removal`, by the scores that it was selected by; notes that of every kind."""
        left = {kind: _those_kept(vectors, removal.kept.get(kind)) for kind, vectors in scores.items()}
        ranking = Ranking(removal.after, left, self.rules)
        names = (*self.rules.kinds, *self.rules.blocks)
        self.next_saliency = {name: unit.score for name in names if (unit := ranking.peek(name)) is not None}
        return ranking.peek()

    def _zero(self, removal: Removal, optimizer: torch.optim.Optimizer) -> None:
        """Let go of what was selected from the shape at hand."""
        kept = removal.kept if self.pending is None else compose(self.pending.kept, removal.kept)
        self.survivors = compose(self.survivors, removal.kept)
        self.pending = Removal(self.physical, removal.after, kept, removal.units)
        if self.grams is not None:
            self.parallel.mean_tensors(self.grams.grams.values())
            self.grams.update_weights(self.pending)
        zero_groups(self.model, self.pending, optimizer)

    def compact(self, loss: TrainingLoss, optimizer: torch.optim.Optimizer) -> tuple[TrainingLoss, nn.Module]:
        """Physically remove what is pending; returns the loss and what to call in a step."""
        removal = self.pending
        assert removal is not None
        if self.parallel.mode == "fsdp":
            loss, callee = rebuild_sharded(loss, removal, optimizer, self.parallel)
            self.model = loss.model
        else:
            remove_groups(self.model, removal, optimizer)
            callee = self.parallel.wrap(loss)
        self.tracker.keep(removal.after, removal.kept)
        if self.is_done:
            self.tracker.detach()
        else:
            self.tracker.attach(self.model)
        if self.grams is not None:
            self.grams.keep(removal)
            self.grams.attach(self.model)
        self.physical, self.pending, self.events_since_compaction = removal.after, None, 0
        self._drop_grams_when_done()
        return loss, callee

    def recover(
        self,
        whole: Any,
        removal: Removal,
        windows: np.ndarray,
        dtype: torch.dtype,
        rows: Tensor | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Fit the model to what it was before `removal` (--recover) on windows [n, S + 1], the same on every rank.

        `rows`: those of `whole` that the model has, where some went before `removal`. `check`: see LeastSquares.fit.
        """
        tokens = torch.from_numpy(self.parallel.my_rows(windows)).to(self.parallel.device)
        tokens = torch.where(tokens < 0, ~tokens, tokens)[:, :-1]
        stem = removal.kept["stem"][0]
        fit = LeastSquares(self.model, whole, stem, self.settings.recover_damping, dtype, rows).fit
        fit(tokens, self.parallel, check)

    def _drop_grams_when_done(self) -> None:
        """Once nothing more goes, nothing needs to be absorbed."""
        if self.grams is not None and self.is_done and self.pending is None:
            self.grams.detach()
            self.grams = None

    def state_json(self) -> dict[str, Any]:
        """What `load_state` takes as `values`: positions of groups, as JSON."""
        return {
            "survivors": kept_to_json(self.survivors, self.plan.source),
            "pending": kept_to_json(self.pending.kept, self.physical) if self.pending is not None else None,
            "wants_rows": self.wants_rows,
            "logical": self.architecture.to_dict(),
            "events_since_compaction": self.events_since_compaction,
            "taken": [asdict(unit) for unit in self.taken] if self.taken is not None else None,
        }

    def state_tensors(self) -> dict[str, Any]:
        """What `load_state` takes as `tensors`: scores and Gram matrices, the same on every rank."""
        return {
            "tracker": self.tracker.state_dict(),
            "blocks": self.blocks.state() if self.blocks is not None else {},
            "grams": self.grams.grams if self.grams is not None else {},
        }

    def load_state(self, values: dict[str, Any], tensors: dict[str, Any], model: Any) -> None:
        """Continue from a checkpoint whose (physical) model is loaded already."""
        self.survivors = kept_from_json(values["survivors"], self.plan.source)
        self.wants_rows = values["wants_rows"]
        self.events_since_compaction = values["events_since_compaction"]
        if (taken := values.get("taken")) is not None:
            self.taken = [
                Unit(**unit | {"parts": tuple((layer, tuple(at)) for layer, at in unit["parts"])}) for unit in taken
            ]
        logical = Architecture.from_dict(values["logical"])
        if values["pending"] is not None:
            kept = kept_from_json(values["pending"], self.physical)
            self.pending = Removal(self.physical, logical, kept, ())
            set_survivors(model, kept_channels(self.pending.kept, self.physical, None, "hidden"))
        self.is_done = self.budget.is_met(logical)
        self.tracker.load_state_dict(tensors["tracker"])
        self.tracker.attach(model)
        if self.blocks is not None:
            self.blocks.load_state(tensors["blocks"])
        if self.grams is not None:
            self.grams.grams = tensors["grams"]
            self.grams.attach(model)
            self._drop_grams_when_done()


def _those_kept(vectors: list[Tensor], kept: list[Tensor] | None) -> list[Tensor]:
    """Return the scores of surviving groups. Every layer keeps the scores of its blocks."""
    if kept is None:
        return vectors
    return [vector[survivors.to(vector.device)] for vector, survivors in zip(vectors, kept, strict=True)]


def kept_to_json(kept: Kept, before: Architecture) -> dict[str, list[list[int]]]:
    """Return positions in a model of shape `before` as JSON. A complete vocabulary is left out."""
    is_whole = len(kept["vocabulary"][0]) == before.vocab_size
    return {
        kind: [layer.tolist() for layer in layers]
        for kind, layers in kept.items()
        if kind != "vocabulary" or not is_whole
    }


def kept_from_json(values: dict[str, list[list[int]]], before: Architecture) -> Kept:
    """Read the values of `kept_to_json`."""
    kept = {kind: [torch.tensor(layer, dtype=torch.int64) for layer in layers] for kind, layers in values.items()}
    return {"vocabulary": all_groups(before)["vocabulary"]} | kept
