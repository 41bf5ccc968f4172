"""Separate reasoning, text and function calls in an answer while it is generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .spaced_texts import ObjectScanner
from .text_stream import partial_length
from .tool_format import ToolFormat


@dataclass(frozen=True)
class TextEvent:
    """A part of the text for the user."""

    text: str


@dataclass(frozen=True)
class ReasoningEvent:
    """A part of the model's reasoning, which precedes the text for the user."""

    text: str


@dataclass(frozen=True)
class CallEvent:
    """The start of the call number `index` of the answer, counted from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsEvent:
    """A part of the JSON object with the arguments of a call."""

    index: int
    text: str


Event = TextEvent | ReasoningEvent | CallEvent | ArgumentsEvent

BEGIN_REASONING, END_REASONING = "<think>", "</think>"
"""Marks of reasoning in the chat templates of Qwen3, SmolLM3, DeepSeek-R1 and others."""


class ReasoningReader:
    """Reads an answer piece by piece. What precedes </think> is reasoning, and `rest` reads what follows."""

    def __init__(self, is_begun: bool, rest: CallReader | None) -> None:
        """Expect <think> at the start of the answer, unless the prompt ends with it (`is_begun`).

        Without `rest` all that follows </think> is text.
        """
        self._rest = rest
        self._state: Literal["start", "reasoning", "text"] = "reasoning" if is_begun else "start"
        self._unread = ""
        self._is_blank = True
        """True until the reasoning, or the text after it, has a visible character. Space before it is dropped."""

    @property
    def num_calls(self) -> int:
        """Return the number of calls so far."""
        return self._rest.num_calls if self._rest is not None else 0

    def push(self, text: str) -> list[Event]:
        """Add a piece and return the events that are certain now. Text that may end the reasoning is held back."""
        self._unread += text
        events: list[Event] = []
        if self._state == "start":
            begin = self._unread.lstrip()
            if begin.startswith(BEGIN_REASONING):
                self._state, self._unread = "reasoning", begin.removeprefix(BEGIN_REASONING)
            elif not BEGIN_REASONING.startswith(begin):
                self._state, self._is_blank = "text", False
        if self._state == "reasoning":
            reasoning, mark, after = self._unread.partition(END_REASONING)
            held_back = 0 if mark else partial_length(reasoning, (END_REASONING,))
            # space at the end is held back as well: it is dropped if the reasoning ends there
            shown = reasoning[: len(reasoning) - held_back].rstrip()
            self._unread = after if mark else self._unread[len(shown) :]
            if visible := self._without_space(shown):
                events.append(ReasoningEvent(visible))
            if mark:
                self._state, self._is_blank = "text", True
        if self._state == "text" and (visible := self._without_space(self._unread)):
            self._unread = ""
            events += self._rest.push(visible) if self._rest is not None else [TextEvent(visible)]
        return events

    def _without_space(self, text: str) -> str:
        """Return `text`, without the space that begins the reasoning or the text after it."""
        text = text.lstrip() if self._is_blank else text
        self._is_blank = self._is_blank and not text
        return text

    def finish(self) -> list[Event]:
        """Return the text that was held back, at the end of the answer."""
        if self._state == "reasoning":
            kept = self._unread.rstrip()
            return [ReasoningEvent(kept)] if kept else []
        shown: list[Event] = []
        if self._unread and self._state == "start":  # a beginning of <think> that did not go on
            shown.append(TextEvent(self._unread))
        return shown + (self._rest.finish() if self._rest is not None else [])


class CallReader:
    """Reads an answer in a ToolFormat piece by piece."""

    def __init__(self, format: ToolFormat, must_call: bool = False) -> None:
        """Expect nothing but calls if the answer `must_call`."""
        self.format, self._must_call = format, must_call
        self.num_calls = 0
        self._state: Literal["text", "name", "arguments", "after"] = "text"
        self._unread = ""
        self._object = ObjectScanner()

    def push(self, text: str) -> list[Event]:
        """Add a piece and return the events that are certain now. Text that may begin a call is held back."""
        self._unread += text
        events: list[Event] = []
        step = {"text": self._text, "name": self._name, "arguments": self._arguments, "after": self._after}
        # each step tells whether the next state may find something in the rest of the text
        while step[self._state](events):
            pass
        return events

    def finish(self) -> list[Event]:
        """Return the text that was held back, at the end of the answer. The beginning of a required call is none."""
        rest, self._unread = self._unread, ""
        return [TextEvent(rest)] if rest and self._state == "text" and not self._must_call else []

    def _take(self, length: int) -> str:
        taken, self._unread = self._unread[:length], self._unread[length:]
        return taken

    def _text(self, events: list[Event]) -> bool:
        start = self._unread.find(self.format.begin)
        has_call = start >= 0
        if not has_call:
            start = len(self._unread) - partial_length(self._unread, (self.format.begin,))
        if text := self._take(start):
            events.append(TextEvent(text))
        if has_call:
            self._take(len(self.format.begin))
            self._state = "name"
        return has_call

    def _name(self, events: list[Event]) -> bool:
        end = self._unread.find(self.format.middle)
        if end < 0:
            return False
        events.append(CallEvent(self.num_calls, self._take(end)))
        self._take(len(self.format.middle))
        self.num_calls += 1
        self._state, self._object = "arguments", ObjectScanner()
        return True

    def _arguments(self, events: list[Event]) -> bool:
        length, spaceless = self._object.push_object(self._unread)
        text = self._take(length)
        if text := spaceless if self.format.has_spaced_texts else text:
            events.append(ArgumentsEvent(self.num_calls - 1, text))
        if self._object.is_over:
            self._state = "after"
        return self._object.is_over

    def _after(self, events: list[Event]) -> bool:
        between, end = self.format.between, self.format.end
        if between and self._unread.startswith(between):
            self._take(len(between))
            self._state = "name"
            return True
        is_undecided = any(marker.startswith(self._unread) for marker in (between, end))
        # BETWEEN may begin with END, as in Hermes: then END alone may still become BETWEEN
        may_be_between = between and between.startswith(self._unread)
        if end and self._unread.startswith(end) and not may_be_between:
            self._take(len(end))
            self._state = "text"
            return bool(self._unread)
        if not is_undecided:  # text that belongs to no call
            self._state = "text"
        return not is_undecided
