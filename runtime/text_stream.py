"""Turn token bytes into text that can be shown at once, without partial characters or partial stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns pieces of UTF-8 into text, and holds back text that may become a stop string."""

    def __init__(self, stop: Sequence[str] = (), until: str = "") -> None:
        """Start with the strings `stop`, which are ignored after the text `until`."""
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        """True after a stop string. Its text and everything after it are dropped."""
        self.found = ""
        """The stop string, "" if there was none."""
        self._until = (until,) if until and self.stop else ()
        # incremental: a character may be spread over several tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._unshown = ""

    def push(self, piece: bytes) -> str:
        """Add a piece and return the text that can be shown."""
        return self._emit(self._decoder.decode(piece))

    def finish(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        text = self._emit(self._decoder.decode(b"", final=True))
        self._until = ()  # a partial `until` is plain text now
        text += self._emit("")
        unshown, self._unshown = self._unshown, ""
        return text + ("" if self.stopped else unshown)

    def _emit(self, text: str) -> str:
        if self.stopped:
            return ""
        self._unshown += text
        end = self._unshown.find(self._until[0]) if self._until else -1
        length = end if end >= 0 else len(self._unshown) - partial_length(self._unshown, self._until)
        searched = self._unshown[:length]
        starts = [(searched.find(stop), stop) for stop in self.stop]
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if found:  # the string that is complete first, as if every character came alone
            _, start, self.found = min(found)
            self.stopped, self._unshown = True, ""
            return searched[:start]
        if end >= 0:
            self.stop, self._until, searched = (), (), self._unshown
        split = len(searched) - partial_length(searched, self.stop)
        text, self._unshown = self._unshown[:split], self._unshown[split:]
        return text


def partial_length(text: str, markers: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of one of `markers`."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest
