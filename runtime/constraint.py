"""What an answer may be, token by token: the seam between the loop of `generation` and grammars."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """The tokens that one answer may go on with; it is asked and told between two tokens. V is the vocabulary size."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow: the answer ends here, without an end token."""
        ...

    def mask(self, logits: np.ndarray) -> None:
        """Set what may not come next in the fp32 `logits` [V] to -inf, in place: everything where nothing may.

        The end tokens are to be left alone only where the answer may end.
        """
        ...

    def push(self, token: int) -> None:
        """`token`, which the mask allowed and which does not end the answer, was chosen."""
        ...
