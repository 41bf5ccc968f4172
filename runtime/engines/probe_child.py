"""The child of `probe`: loads the file PATH with OPTIONS, EngineOptions as JSON, and evaluates a few tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import numpy as np

from ..base.command import run_command
from ..base.errors import ArtefactError, EfficientLLMError
from .artefact import Artefact
from .engine import EngineOptions, load_engine
from .probe import REFUSED

TEXT = "Hello"


def body(argv: Sequence[str]) -> int:
    """0 where the model works, REFUSED where loading it ends in a clear error."""
    path, options = argv
    artefact = Artefact.open(path)
    try:
        engine = load_engine(artefact, EngineOptions(**json.loads(options) | {"huge_pages": False}), probe=False)
    except EfficientLLMError:
        return REFUSED
    tokens = engine.tokenize(TEXT, special=True)[:4] or [0]
    logits = np.stack([engine.prefill(tokens), engine.decode(tokens[-1])])
    if not np.isfinite(logits.max(axis=-1)).all():  # NaN, too
        raise ArtefactError(f"{artefact.path} computes no numbers; it is damaged, export it again")
    engine.token_bytes(int(logits[-1].argmax()))
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
