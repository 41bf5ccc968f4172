"""What a kit is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..checkpoint import Checkpoint
from ..greedy import GreedyCheck
from ..manifest import Contents

Platform = Literal["android", "ios"]


@dataclass(frozen=True)
class Kit:
    """What is known once the models are written."""

    platform: Platform
    checkpoint: Checkpoint
    models: Sequence[Contents]
    """One for each format."""
    checks: Mapping[str, GreedyCheck]
    """Engine -> what its model answers."""
    context: int
    """Tokens of a conversation."""
    snippets: Sequence[str]
    """Files of code."""
    pushed: Sequence[str]
    """Files that belong on the phone."""
    executorch: str
    """The release that exported the program: its runtime on the phone should be the same; "" without a program."""

    @property
    def name(self) -> str:
        return Path(self.checkpoint.name).name
