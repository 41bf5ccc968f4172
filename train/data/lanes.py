"""Windows that come from many documents at once, whatever the documents' lengths.

A lane packs documents end to end and is read window by window. A source keeps many lanes and visits all of them, in a
new random order each time, before any comes again: neighbouring windows come from as many documents as there are
lanes. Long documents that lanes begin with are begun at a random place (and their beginnings read after their ends):
else the first windows of a run would all be beginnings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

LANES = 64
"""Documents of a source that are read side by side."""

ORDER, START = 1_000_001, 1_000_002
"""What random numbers are for; larger than any number of epochs, which seeds the order of documents."""


class Lanes:
    """Endless windows [S + 1] of one source, a function of the seed alone."""

    def __init__(self, next_document: Callable[[], np.ndarray], count: int, window: int, seed: tuple[int, ...]) -> None:
        """`next_document` gives token ids int32 [n], its end-of-text token among them; n > 0. `window`: S."""
        self._next_document = next_document
        self._seed = seed
        self.window = window
        self.buffers = [np.empty(0, np.int32)] * count
        """What each lane holds of its documents and has not given yet."""
        self.drawn = 0
        """Windows given so far."""

    def next_window(self) -> np.ndarray:
        """int32 [S + 1]; its last token is the first of the lane's next window, so each token is predicted once."""
        visit, turn = divmod(self.drawn, len(self.buffers))
        lane = int(self._order(visit)[turn])
        parts, size = [self.buffers[lane]], len(self.buffers[lane])
        while size <= self.window:
            document = self._next_document()
            if not visit and not size and len(document) > self.window:
                document = np.roll(document, self._random(START, lane).integers(len(document)))
            parts.append(document)
            size += len(document)
        tokens = np.concatenate(parts)
        self.buffers[lane] = tokens[self.window :]
        self.drawn += 1
        return tokens[: self.window + 1]

    def _order(self, visit: int) -> np.ndarray:
        return self._random(ORDER, visit).permutation(len(self.buffers))

    def _random(self, *what: int) -> np.random.Generator:
        """Numbers that depend on the seed and on what they are for, not on those drawn before."""
        return np.random.default_rng([*self._seed, *what])

    def state(self) -> dict[str, Any]:
        """Cheap: arrays are shared, and none is ever changed."""
        return {"buffers": list(self.buffers), "drawn": self.drawn}

    def load_state(self, state: dict[str, Any]) -> None:
        self.buffers, self.drawn = list(state["buffers"]), state["drawn"]
