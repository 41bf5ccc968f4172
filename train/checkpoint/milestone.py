"""Moments of a run at which other parts than the loop do something."""

from __future__ import annotations


class Milestone:
    """A part of a run that acts at its start, at a removal or at its end. Every call is collective."""

    def at_start(self) -> None:
        """Act after the source is measured, before the first step of this process."""

    def before_removal(self, target: float) -> None:
        """Act before a removal down to `target` in the measure of the budget."""

    def after_removal(self) -> None:
        """Act after a removal."""

    def at_end(self) -> None:
        """Act after the last step."""
