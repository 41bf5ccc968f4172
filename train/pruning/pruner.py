"""State of pruning in a run: saliency, survivors, and groups that are zeroed but still in the tensors.

A pruning event (train/loop/pruning_event.py) zeroes groups in rounds, and `compact` takes zeroed groups out of the
tensors at its end. No object here holds the model: it is an argument.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.state import PartState
from ..compute.distributed import Parallel
from ..compute.trained_model import TrainedModel
from ..model.architecture import Architecture
from ..model.groups import KINDS
from ..model.irregular import architecture_of
from .blocks import BlockScores
from .criteria import uses_gradient
from .plan import PruningPlan
from .recovery import InputGrams
from .rules import SelectionRules
from .running_scores import Scores, scores_of_kept
from .selection import Kept, Removal, Unit, all_groups, compose
from .surgery import compact_model, kept_channels, set_survivors


class Pruner:
    """The pruning state of one run."""

    def __init__(self, plan: PruningPlan, model: Any, parallel: Parallel, seed: int) -> None:
        """Observe `model`, of the source's shape or of a checkpoint's (then `load_state` follows)."""
        self.plan, self.settings, self.budget = plan, plan.settings, plan.budget
        self.architecture = architecture_of(model.config)
        """Shape without the removed groups."""
        self.zeroed: Removal | None = None
        """Groups that are zeroed and still in the tensors; `before` is the shape of the tensors."""
        self.survivors = all_groups(plan.source)
        """Surviving groups as positions in the source model."""
        self.is_vocabulary_due = "vocabulary" in plan.rules.kinds
        """Whether vocabulary rows are still to be removed: once, before all other groups."""
        self.units_of_event: list[Unit] | None = None
        """Units that an unfinished event has zeroed, with positions in the source, or None between two events."""
        self.next_saliency: dict[str, float] = {}
        """Score (see selection.Unit) of the next unit of each kind."""
        self.tracker = plan.tracker(self.architecture, seed, parallel.mean_tensors)
        self.tracker.attach(model)
        self.ranks_by_gradients = uses_gradient(self.settings.saliency)
        self.grams = self._make_grams(model) if plan.settings.weight_update == "obs" else None
        self.blocks = self._make_blocks() if plan.settings.measures_blocks else None

    def _make_grams(self, model: Any) -> InputGrams:
        settings = self.settings
        axes = {KINDS[name].axis for name in self.rules.kinds}
        return InputGrams(
            model, axes, settings.obs_decay, settings.obs_damping, settings.obs_max_width, settings.obs_rows
        )

    def _make_blocks(self) -> BlockScores:
        source, settings = self.plan.source, self.settings
        span = self.budget.measure.of(source) - self.budget.target
        return BlockScores(self.rules.blocks, settings.saliency, len(source.layers), settings.block_renewals, span)

    @property
    def rules(self) -> SelectionRules:
        """Return the current rules of removal."""
        rules = self.plan.rules
        if self.is_vocabulary_due:
            return rules
        return replace(rules, kinds=tuple(name for name in rules.kinds if name != "vocabulary"))

    @property
    def size(self) -> float:
        """Return the current size in the budget's measure."""
        return self.budget.measure.of(self.architecture)

    @property
    def is_done(self) -> bool:
        """Tell whether the target is reached."""
        return self.budget.is_met(self.architecture)

    def is_above(self, target: float) -> bool:
        """Tell whether the model is larger than `target` and there are scores to rank groups by."""
        return self.tracker.num_observations > 0 and self.size > target

    @property
    def needs_microbatches(self) -> bool:
        """Tell whether saliency needs each microbatch's own gradient."""
        return not self.is_done and self.tracker.needs_microbatches

    def observe_gradients(self, model: Any, sample_weight: float = 1.0) -> None:
        """Add the current gradients to the saliency, as a sample of this weight, until the target is reached."""
        if not self.is_done:
            self.tracker.accumulate(model.named_parameters(), sample_weight)

    def finish_step(self) -> None:
        """Average the step's saliency in, before the weights change."""
        if not self.is_done:
            self.tracker.finish_step()

    def discard_step(self, grams: dict[str, Tensor] | None = None) -> None:
        """Discard the saliency of a step, and restore these Gram matrices if they are given."""
        self.tracker.discard_step()
        if self.grams is not None and grams is not None:
            self.grams.grams = grams

    def copy_grams(self) -> dict[str, Tensor] | None:
        """Return copies of the Gram matrices for `discard_step`, or None without a second-order update."""
        if self.grams is None:
            return None
        return {name: gram.clone() for name, gram in self.grams.grams.items()}

    def scores(self) -> Scores:
        """Return the scores of the remaining groups."""
        if self.zeroed is None:
            return self.tracker.scores
        kept = self.zeroed.kept
        return {kind: scores_of_kept(vectors, kept[kind]) for kind, vectors in self.tracker.scores.items()}

    def add(self, removal: Removal) -> Removal:
        """Record a removal, and return it together with earlier ones that are still in the tensors."""
        kept, before = removal.kept, removal.before
        if self.zeroed is not None:  # the tensors still have the shape from before the earlier removals
            kept, before = compose(self.zeroed.kept, kept), self.zeroed.before
        self.survivors = compose(self.survivors, removal.kept)
        self.architecture = removal.after
        self.zeroed = Removal(before, removal.after, kept, removal.units)
        return self.zeroed

    def compact(self, trained: TrainedModel) -> None:
        """Take zeroed groups out of the tensors of model and optimizer, in place (a collective call)."""
        removal = self.zeroed
        if removal is None:
            return
        self.zeroed = None
        compact_model(trained, removal)
        self.tracker.keep(removal.after, removal.kept)
        if self.is_done:
            self.tracker.detach()
        else:  # under FSDP the compacted model is a new one without hooks
            self.tracker.attach(trained.model)
        if self.grams is not None:
            self.grams.keep(removal)
            self.grams.attach(trained.model)
        self._drop_grams_when_done()
        trained.heap.reset()  # tensors of the new widths do not fit into the gaps of the old ones

    def _drop_grams_when_done(self) -> None:
        """Free the Gram matrices after the last removal."""
        if self.grams is not None and self.is_done and self.zeroed is None:
            self.grams.detach()
            self.grams = None

    def state(self) -> PartState:
        """Return the positions of groups as JSON, the scores, and the Gram matrices of this rank."""
        kept = kept_to_json(self.zeroed.kept, self.zeroed.before) if self.zeroed is not None else None
        units = self.units_of_event
        values = {
            "survivors": kept_to_json(self.survivors, self.plan.source),
            "pending": kept,
            "wants_rows": self.is_vocabulary_due,
            "logical": self.architecture.to_dict(),
            "units_of_event": [asdict(unit) for unit in units] if units is not None else None,
        }
        blocks = self.blocks.state() if self.blocks is not None else {}
        own = self.grams.grams if self.grams is not None else {}
        return PartState(values, {"tracker": self.tracker.state_dict(), "blocks": blocks}, own)

    def load(self, state: PartState, model: Any) -> None:
        """Continue from a checkpoint whose model is loaded already, in the shape of its tensors."""
        values, tensors = state.values, state.tensors
        self.survivors = kept_from_json(values["survivors"], self.plan.source)
        self.is_vocabulary_due = values["wants_rows"]
        units = values["units_of_event"]
        self.units_of_event = [_unit_from_json(unit) for unit in units] if units is not None else None
        before, self.architecture = self.architecture, Architecture.from_dict(values["logical"])
        if values["pending"] is not None:
            kept = kept_from_json(values["pending"], before)
            self.zeroed = Removal(before, self.architecture, kept, ())
            set_survivors(model, kept_channels(kept, before, None, "hidden"))
        self.tracker.load_state_dict(tensors["tracker"])
        self.tracker.attach(model)
        if self.blocks is not None:
            self.blocks.load_state(tensors["blocks"])
        if self.grams is not None:
            self.grams.grams = state.own
            self.grams.attach(model)
            self._drop_grams_when_done()


def kept_to_json(kept: Kept, before: Architecture) -> dict[str, list[list[int]]]:
    """Return positions in a model of shape `before` as JSON. A complete vocabulary is omitted."""
    # tens of thousands of numbers in every checkpoint
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


def _unit_from_json(values: dict[str, Any]) -> Unit:
    parts = tuple((layer, tuple(positions)) for layer, positions in values["parts"])
    return Unit(values["kind"], parts, values["freed"], values["score"])
