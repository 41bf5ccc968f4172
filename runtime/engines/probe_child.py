"""Child process of `probe`: load the file PATH with OPTIONS (EngineOptions as JSON) and evaluate a few tokens."""

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
    """Return 0 if the model works, REFUSED if loading it ends in a clear error."""
    path, options_json = argv
    artefact = Artefact.open(path)
    try:
        # Huge pages would cost up to a second for a process that ends at once.
        options = EngineOptions(**json.loads(options_json) | {"huge_pages": False})
        engine = load_engine(artefact, options, probe=False)
    except EfficientLLMError:
        return REFUSED
    tokens = engine.tokenize(TEXT, special=True)[:4] or [0]
    logits = np.stack([engine.prefill(tokens), engine.decode(tokens[-1])])
    if not np.isfinite(logits.max(axis=-1)).all():  # a NaN becomes the maximum
        raise ArtefactError(f"{artefact.path} computes NaN or infinite logits; it is damaged, export it again")
    engine.token_bytes(int(logits[-1].argmax()))
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
