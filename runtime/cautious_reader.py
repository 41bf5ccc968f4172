"""Read an answer with calls, and ask the user where its calls are not sure enough."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .call_reader import ArgumentsEvent, CallEvent, CallReader, Event, ReasoningReader, TextEvent
from .engines.calibration import Calibration
from .generation import GenerationStats

QUESTION = "I am not sure. Do you mean {}?"
"""Answer in place of calls that are not sure enough, with their names and values."""
UNSURE = "I am not sure. Could you say it in other words?"
"""Answer in place of calls that are cut short."""
AGREEMENTS = frozenset(
    ("yes", "yes please", "yeah", "yep", "sure", "ok", "okay", "right", "correct", "do it", "yes do it")
)


def reply_to_question(messages: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Return the QUESTION that the last message replies to, "" without one, and how many last messages agree.

    These are questions and yeses, and the request before them is answered again. A reply that is no yes agrees not.
    """
    asked, agreeing, said = "", 0, [*messages]
    while _ends_with_question(said):
        asked = asked or said[-2]["content"]
        if " ".join(re.sub("[.,!]", " ", said[-1]["content"].lower()).split()) not in AGREEMENTS:
            break
        said, agreeing = said[:-2], agreeing + 2
    return asked, agreeing


def _ends_with_question(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if a request, a QUESTION and a reply of the user come last."""
    begin, end = QUESTION.split("{}")
    roles = [message["role"] for message in messages[-3:]]
    if roles not in (["user", "assistant", "user"], ["tool", "assistant", "user"]):
        return False
    asked = messages[-2]["content"] or ""
    return asked.startswith(begin) and asked.endswith(end)


def question(events: Sequence[Event]) -> str:
    """Return the QUESTION about the calls in `events`, or UNSURE if a text at which answers stop cut one short."""
    said = []
    for call in events:
        if isinstance(call, CallEvent):
            pieces = [each for each in events if isinstance(each, ArgumentsEvent) and each.index == call.index]
            try:
                fields = json.loads("".join(each.text for each in pieces))
            except ValueError:
                return UNSURE
            if not isinstance(fields, dict):
                return UNSURE
            name = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", call.name).lower()
            values = ", ".join(f"{key} {' and '.join(_values(value)) or 'none'}" for key, value in fields.items())
            said.append(f"{name} ({values})" if values else name)
    return QUESTION.format(" and ".join(said))


def _values(value: Any) -> Iterator[str]:
    """Yield the values in a value of JSON as text."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _values(each)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


class CautiousReader:
    """Reads an answer as `reader` does, and replaces one whose calls are less sure than `least` by a question."""

    def __init__(
        self,
        reader: CallReader | ReasoningReader,
        stats: GenerationStats,
        calibration: Calibration,
        least: float,
        asked: str = "",
        is_agreed: bool = False,
    ) -> None:
        """Read an answer with these `stats`. With `least` 0 all events pass at once, else at the end of the answer.

        `asked`: the question that the user replied to. After a yes its calls pass and no others, else only others.
        """
        self._reader, self._stats, self._calibration = reader, stats, calibration
        self._least, self._asked, self._is_agreed = least, asked, is_agreed
        self._held: list[Event] = []
        self._is_refused = False
        self.confidence: float | None = None
        """Probability that the calls are right, after the end of a whole answer with calls."""

    @property
    def num_calls(self) -> int:
        """Return the number of calls so far, 0 if they are replaced."""
        return 0 if self._is_refused else self._reader.num_calls

    def push(self, text: str) -> list[Event]:
        """Add a piece and return the events that are certain now."""
        self._held += self._reader.push(text)
        # text before a call may announce it
        return [] if self._least else self._taken()

    def finish(self) -> list[Event]:
        """Return the events that were held back, at the end of the answer."""
        self._held += self._reader.finish()
        sure = self._stats.mean_probability
        if not self._reader.num_calls or sure is None:
            return self._taken()
        is_cut = self._stats.finish_reason == "length"
        self.confidence = None if is_cut else self._calibration.probability(sure)
        text = UNSURE if is_cut else question(self._held)
        passes = text == self._asked if self._is_agreed else sure >= self._least and not is_cut and text != self._asked
        if not self._least or passes:
            return self._taken()
        self._is_refused = True
        return [TextEvent(UNSURE if text == self._asked else text)]

    def _taken(self) -> list[Event]:
        held, self._held = self._held, []
        return held
