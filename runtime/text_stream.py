"""From token bytes to text that can be shown at once: no half characters, no half stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns pieces of UTF-8 into text, holding back what may still become a stop string."""

    def __init__(self, stop: Sequence[str] = (), until: str = "") -> None:
        """Where the text `until` begins, which is no part of a stop string then, they count no more."""
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        """Whether a stop string was met; its text and all after it are dropped."""
        self._until = (until,) if until and self.stop else ()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._unshown = ""

    def push(self, piece: bytes) -> str:
        """Text that is safe to show after this piece."""
        return self._emit(self._decoder.decode(piece))

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        text = self._emit(self._decoder.decode(b"", final=True))
        self._until = ()  # what might have begun it did not
        text += self._emit("")
        unshown, self._unshown = self._unshown, ""
        return text + ("" if self.stopped else unshown)

    def _emit(self, text: str) -> str:
        if self.stopped:
            return ""
        self._unshown += text
        end = self._unshown.find(self._until[0]) if self._until else -1
        length = end if end >= 0 else len(self._unshown) - unfinished(self._unshown, self._until)
        searched = self._unshown[:length]
        found = [(start + len(stop), start) for stop in self.stop if (start := searched.find(stop)) >= 0]
        if found:  # the one that is whole first, as if every character came alone
            self.stopped = True
            text, self._unshown = searched[: min(found)[1]], ""
            return text
        if end >= 0:
            self.stop, self._until, searched = (), (), self._unshown
        split = len(searched) - unfinished(searched, self.stop)
        text, self._unshown = self._unshown[:split], self._unshown[split:]
        return text


def unfinished(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `markers` and is none yet."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest
