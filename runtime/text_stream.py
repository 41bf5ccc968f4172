"""From token bytes to text that can be shown at once: no half characters, no half stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns pieces of UTF-8 into text, holding back what may still become a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        """Whether a stop string was met; its text and all after it are dropped."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Text that is safe to show after this piece."""
        return self._emit(self._decoder.decode(piece))

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        text = self._emit(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def _emit(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self.stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = self._longest_partial_stop()
        split = len(self._held) - keep
        text, self._held = self._held[:split], self._held[split:]
        return text

    def _longest_partial_stop(self) -> int:
        """Length of the longest suffix of the held text that begins a stop string."""
        longest = 0
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
