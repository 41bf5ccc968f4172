"""What a run's removal of vocabulary rows goes by."""

from __future__ import annotations

import numpy as np

from .compute.loss import TrainingLoss
from .data.encoding import Encoder
from .plan import RunPlan
from .pruning.rows import RowProbe
from .vocabulary.frequency import count_tokens, expected_splits


def row_probe(plan: RunPlan, loss: TrainingLoss, windows: np.ndarray) -> RowProbe:
    """Measures rows of the model as it is on `windows` [n, S + 1], by how often the run's text has their tokens."""
    assert plan.pruning is not None
    assert plan.pruning.pieces is not None
    settings, pieces = plan.config, plan.pruning.pieces
    fraction, pruning = settings.source.held_out_fraction, settings.pruning
    counts = count_tokens(plan.data, Encoder(plan.tokenizer), fraction, pieces.size, pruning.vocabulary_tokens)
    splits = expected_splits(pieces, counts, pruning.vocabulary_prior)
    return RowProbe(loss, plan.tokenizer, splits, windows, plan.compute.parallel)
