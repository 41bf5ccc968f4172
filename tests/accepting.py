"""Whether a grammar accepts a text, in the tokens of an engine."""

from __future__ import annotations

import numpy as np

from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.grammar import GrammarConstraint


def is_accepted(constraint: GrammarConstraint | None, engine: EngineScheduler, text: str) -> bool:
    """Return whether a constraint allows `text` as a whole answer."""
    assert constraint is not None
    for token in engine.tokenize(text, special=False):
        logits = np.zeros(engine.vocab_size, np.float32)
        constraint.mask(logits)
        if logits[token] == -np.inf:
            return False
        constraint.push(token)
    return constraint.is_accepting
