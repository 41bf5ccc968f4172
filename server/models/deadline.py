"""The time that a request has, loading, waiting and answering together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ..schemas.error import APIError


@dataclass(frozen=True)
class Deadline:
    """When a request has had its time."""

    seconds: float
    """From its arrival."""
    at: float
    """By the event loop's clock."""

    @classmethod
    def from_now(cls, seconds: float) -> Deadline:
        return cls(seconds, asyncio.get_running_loop().time() + seconds)

    def error(self) -> APIError:
        """What the client is told."""
        return APIError(408, f"the answer took longer than {self.seconds:g} s", "timeout_error", "timeout")
