"""One removal of a run, from its ranking to compaction and recovery.

An event removes vocabulary rows first, once in a run. Then it zeroes the units with the lowest scores until the target
is met, compacts the tensors and refits the remaining weights. If block prices scale the scores, it zeroes in rounds.
After each round the next block is measured again, because its price from before the removal of its neighbours is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compute.distributed import gathered
from ..compute.loss import TrainingLoss
from ..compute.stop_signal import StopSignal
from ..compute.trained_model import TrainedModel
from ..model.groups import BLOCKS
from ..pruning.blocks import BlockProbe
from ..pruning.measures import PARAMETERS
from ..pruning.pruner import Pruner
from ..pruning.recovery import LeastSquares, fit_inputs
from ..pruning.rows import RowProbe, choose_rows
from ..pruning.running_scores import Scores, scores_of_kept
from ..pruning.selection import Kept, Ranking, Removal, Unit, all_groups, compose, select_removal
from ..pruning.surgery import frozen_loss, zero_groups
from ..vocabulary.frequency import expected_splits
from ..vocabulary.retokenization import TokenAligner
from .run_text import RunText


def switch_vocabulary(pruner: Pruner, trained: TrainedModel, text: RunText) -> None:
    """Read all text without the removed vocabulary rows.

    A teacher with the source's vocabulary still reads the source's tokens.
    """
    kept = pruner.survivors["vocabulary"][0].tolist()
    text.prune_vocabulary(kept)
    num_rows, teacher = pruner.plan.source.vocab_size, trained.loss.teacher
    if teacher is not None and teacher.config.vocab_size == num_rows:
        trained.loss.source_text = TokenAligner(text.tokenizer, text.source_tokenizer, kept, num_rows)


def _in_source(unit: Unit, survivors: Kept) -> Unit:
    """Return a unit with positions in the source model, whose `survivors` its own positions count."""
    if unit.kind in BLOCKS:
        return unit
    vectors = survivors[unit.kind]
    parts = []
    for layer, positions in unit.parts:
        in_source = vectors[layer or 0][list(positions)].tolist()
        parts.append((layer, tuple(in_source)))
    return replace(unit, parts=tuple(parts))


class PruningEvent:
    """One removal. All of its calls are collective.

    A stop signal is answered while blocks, rows or the refit are computed. If the event `needs_restart`, it must then
    start again from a checkpoint before it. Otherwise the same event continues with the next call of `run`, also in
    another process after `Pruner.load_state`.
    """

    def __init__(
        self,
        pruner: Pruner,
        trained: TrainedModel,
        text: RunText,
        batch_size: int,
        stop_signal: StopSignal,
        report: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> None:
        """Prepare an event on `trained`. `batch_size` is the number of windows of a rank in one forward pass.

        `report` gets (name, amount done, total) of long parts.
        """
        self.report = report
        self.pruner, self.trained, self.text = pruner, trained, text
        self.batch_size, self.stop_signal = batch_size, stop_signal
        self.parallel, self.settings = trained.parallel, pruner.settings
        self.needs_restart = self.settings.recover != "none" or pruner.is_vocabulary_due
        """Whether an interrupted event cannot be continued: a refit needs the model from before it."""

    def run(self, target: float) -> tuple[dict[str, Any], dict[str, float] | None]:
        """Remove groups until the budget's measure is at most `target`.

        Return the log fields of the step, {} if nothing was removed, and those of a removal of vocabulary rows.
        """
        pruner, trained = self.pruner, self.trained
        former = None
        if self.settings.recover != "none" and pruner.is_above(target):
            former = frozen_loss(trained)
        # rows first: block prices and the refit then read text in the tokens that the model will have
        rows = vocabulary = None
        if pruner.is_vocabulary_due:
            rows, vocabulary = self._prune_vocabulary()
            pruner.is_vocabulary_due = False
        groups = self._prune_groups(target)
        if groups is not None:
            pruner.compact(trained)
            if former is not None:
                surviving_rows = rows.kept["vocabulary"][0] if rows is not None else None
                self._recover(former, groups, surviving_rows)
        removals = [removal for removal in (rows, groups) if removal is not None]
        parts = [(unit, part) for removal in removals for unit in removal.units for part in unit.parts]
        if not parts:
            return {}, vocabulary
        record = {
            "removed": [[unit.kind, *part] for unit, part in parts],
            "scores": [unit.score for unit, _ in parts],
            "freed": [unit.freed / len(unit.parts) for unit, _ in parts],
            "cost": pruner.rules.ranking_measure.unit,
            "target": target,
            "next_saliency": pruner.next_saliency,
        }
        return record, vocabulary

    def _prune_vocabulary(self) -> tuple[Removal | None, dict[str, float] | None]:
        """Remove vocabulary rows: all but a given number, or those that the ranking takes on the way to the budget.

        Returns (the removal, its log fields), None if no row is selected. Text is read without the rows from then on.
        """
        pruner, settings, shape = self.pruner, self.settings, self.pruner.architecture
        splits = self._expected_splits()
        if settings.vocabulary_rows is not None:
            # the target of 0 is out of reach: the selection ends at `fixed_rows`, which is at least this number
            rules = replace(pruner.rules, kinds=("vocabulary",), blocks=(), measure=PARAMETERS, cost=None)
            selected = select_removal(shape, {"vocabulary": [torch.from_numpy(splits)]}, rules, 0)
            return self._remove_rows(selected), {"rows": selected.after.vocab_size}
        windows = self._extra_windows(settings.block_tokens)
        tokenizer, check = self.text.tokenizer, self.stop_signal.check
        probe = RowProbe(self.trained.loss, tokenizer, splits, windows, self.parallel, check)
        scores = self._ranking_scores()

        # rows compete with all other groups for the whole budget, but only the rows of this selection are removed
        def select(row_scores: Tensor) -> Removal:
            all_scores = scores | {"vocabulary": [row_scores]}
            return select_removal(shape, all_scores, pruner.rules, pruner.budget.target)

        def select_rows(row_scores: Tensor) -> list[int]:
            return select(row_scores).kept["vocabulary"][0].tolist()

        selected = select(choose_rows(probe, select_rows))
        removal = self._remove_rows(selected)
        if removal is None:
            return None, None
        return removal, probe.describe(selected.kept["vocabulary"][0])

    def _remove_rows(self, selected: Removal) -> Removal | None:
        """Remove the vocabulary rows of a selection, and no other group of it. Returns None if it has none."""
        pruner, shape = self.pruner, self.pruner.architecture
        units = tuple(unit for unit in selected.units if unit.kind == "vocabulary")
        if not units:
            return None
        rows = selected.kept["vocabulary"]
        after = replace(shape, vocab_size=len(rows[0]))
        removal = pruner.add(Removal(shape, after, all_groups(shape) | {"vocabulary": rows}, units))
        if pruner.blocks is not None:
            pruner.blocks.shift_renewal(pruner.size)
        pruner.compact(self.trained)
        self.parallel.together(lambda: switch_vocabulary(pruner, self.trained, self.text))
        return removal

    def _expected_splits(self) -> np.ndarray:
        """Return the additional tokens per token of text without each row, fp64 [rows], by its frequency."""
        pieces, settings = self.pruner.plan.pieces, self.settings
        assert pieces is not None
        check = self.stop_signal.check_alone

        def count() -> np.ndarray:
            return self.text.count_tokens(pieces.size, settings.vocabulary_tokens, check)

        counts = self.parallel.together(count)
        return expected_splits(pieces, counts)

    def _prune_groups(self, target: float) -> Removal | None:
        """Zero the lowest-scored units until the budget's measure is at most `target`; None if nothing is removed."""
        pruner, blocks = self.pruner, self.pruner.blocks
        if not pruner.is_above(target):
            return None
        before, kept = pruner.architecture, all_groups(pruner.architecture)
        # the list is in the pruner, whose state a checkpoint holds: an event may stop between two rounds
        if pruner.units_of_event is None:
            pruner.units_of_event = []
            if blocks is not None:  # training has changed the prices of all blocks
                blocks.invalidate()
        # A round ends at the target, at the next renewal of all prices, or before a block whose price is outdated.
        while True:
            scores = self._ranking_scores()
            until = target if blocks is None else max(target, blocks.next_renewal)
            rules, final_target = pruner.rules, pruner.budget.target
            removal = select_removal(pruner.architecture, scores, rules, until, self._is_outdated, final_target)
            if removal.units:
                pruner.units_of_event += [_in_source(unit, pruner.survivors) for unit in removal.units]
                self._zero(removal)
                kept = compose(kept, removal.kept)
            next_unit = self._next_unit(removal, scores)
            if next_unit is None or not pruner.is_above(target):
                break
            if blocks is not None:
                blocks.invalidate(removal.units)
                if blocks.is_outdated(next_unit):
                    blocks.measure(self._block_probe(), next_unit.kind, next_unit.layer)
        units, pruner.units_of_event = pruner.units_of_event, None
        if not units:
            return None
        return Removal(before, pruner.architecture, kept, tuple(units))

    def _ranking_scores(self) -> Scores:
        """Return the scores to rank by. They are in nats and include blocks if these are measured."""
        pruner, blocks = self.pruner, self.pruner.blocks
        scores = pruner.scores()
        if blocks is None:
            return scores
        if pruner.size <= blocks.next_renewal:
            blocks.renew(self._block_probe(), pruner.architecture, scores, pruner.size)
        return blocks.in_nats(scores)

    def _is_outdated(self, unit: Unit, taken: Sequence[Unit] = ()) -> bool:
        """Tell whether a unit is a block whose price must be measured again before its removal."""
        return self.pruner.blocks is not None and self.pruner.blocks.is_outdated(unit, taken)

    def _block_probe(self) -> BlockProbe:
        windows = self._extra_windows(self.settings.block_tokens)
        report = partial(self.report, "measuring the blocks")
        return BlockProbe(self.trained.loss, windows, self.batch_size, self.parallel, self.stop_signal.check, report)

    def _extra_windows(self, num_tokens: int) -> np.ndarray:
        """Return windows [n, S + 1] apart from training, for all ranks."""
        return self.parallel.together(lambda: self.text.extra_windows(num_tokens))

    def _next_unit(self, removal: Removal, scores: Scores) -> Unit | None:
        """Return the next unit after `removal` by the same scores, and note the next score of every kind."""
        rules = self.pruner.rules
        remaining = {kind: scores_of_kept(vectors, removal.kept.get(kind)) for kind, vectors in scores.items()}
        ranking = Ranking(removal.after, remaining, rules)
        self.pruner.next_saliency = {}
        for name in (*rules.kinds, *rules.blocks):
            unit = ranking.peek(name)
            if unit is not None:
                self.pruner.next_saliency[name] = unit.score
        return ranking.peek(final_target=self.pruner.budget.target)

    def _zero(self, removal: Removal) -> None:
        """Zero the selected groups, after the remaining weights absorbed them if --weight-update is on."""
        zeroed, grams, model = self.pruner.add(removal), self.pruner.grams, self.trained.model
        if grams is not None:
            # ranks observe their own tokens between two removals, and must all make the same update
            self.parallel.mean_tensors(grams.grams.values())
            grams.update_weights(model, zeroed)
        zero_groups(model, zeroed, self.trained.optimizer)

    def _recover(self, former: TrainingLoss, groups: Removal, rows: Tensor | None) -> None:
        """Refit the model to that of `former` from before the event. `rows` are the surviving rows of `former`."""
        model, dtype = self.trained.model, self.trained.loss.dtype
        stem = groups.kept["stem"][0]
        refit = LeastSquares(model, former.model, stem, self.settings.recover_damping, dtype, rows)
        windows = self._extra_windows(self.settings.recover_tokens)
        inputs = fit_inputs(self.parallel.own_rows(windows)).to(self.parallel.device)
        with gathered(self.trained.loss, former):
            report = partial(self.report, "refitting the layers after a removal")
            refit.fit(inputs, self.parallel, self.stop_signal.check, report)
