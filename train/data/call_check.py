"""Find what ruins a job in its examples: calls that contradict each other or their tools, and requests of the test.

`efficientllm-data check` prints a line with a count and an example for each finding, and a row for each function.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...runtime.base.errors import MissingExtraError, UsageError
from ...runtime.tool_format import why_not_called
from .chat import Chat

FEWEST_CALLS = 20
"""Calls with an argument from which one value in all of them is a finding."""

FEWEST_REFUSALS = 0.05
"""Share of the training requests without a call, below which the model has seen too few."""

MOST_ROWS = 40
"""Functions in the table."""

TYPES = {"string": "text", "integer": "number", "number": "number", "boolean": "boolean", "array": "list"} | {
    "object": "object",
    "null": "null",
}
"""JSON schema's names of types, and ours."""


def type_of(value: Any) -> str:
    """Return the name of a JSON value's type, a value of TYPES."""
    kinds = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object"}
    return kinds.get(type(value), "null")


def request_of(chat: Chat) -> str:
    """Return the messages before the last answer as JSON."""
    return json.dumps(chat.messages[: _last_answer(chat)], sort_keys=True)


def _last_answer(chat: Chat) -> int:
    """Return the index of the assistant's last message."""
    return max(index for index, message in enumerate(chat.messages) if message["role"] == "assistant")


def digest(text: str) -> bytes:
    """Return a hash of 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass
class Tally:
    """Number of records or calls with one finding, and the first of them."""

    count: int = 0
    example: str = ""

    def add(self, example: str, count: int = 1) -> None:
        self.example = self.example or example
        self.count += count


def lines_of(found: Mapping[str, Tally]) -> list[str]:
    """Return a line with a count and an example for each finding of {its title: Tally}."""
    return [f"{each.count:,} {title}; first: {each.example}" for title, each in found.items() if each.count]


@dataclass
class FunctionCounts:
    """Counts of the calls of one function."""

    num_calls: Counter[bool] = field(default_factory=Counter)
    """{whether the call is of the test: calls}."""
    num_texts: int = 0
    """Texts in the arguments."""
    num_copied: int = 0
    """Texts that occur in the request."""


class CallCheck:
    """What is known of all examples of a job."""

    def __init__(self) -> None:
        self._properties: dict[str, dict[str, Any]] = {}
        """{function: {argument: its schema}} of all tools."""
        self._shapes: defaultdict[tuple[str, tuple[tuple[str, str], ...]], Tally] = defaultdict(Tally)
        """Calls by function and (argument, type) in the order of the call."""
        self._functions: defaultdict[str, FunctionCounts] = defaultdict(FunctionCounts)
        self._values: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        """Values of an argument in the training files, at most two and the number of all calls under ""."""
        self._answers: dict[bytes, bytes | None] = {}
        """{hash of a request: hash of its answer, None once there are two}."""
        self._trained: tuple[set[bytes], set[bytes]] = (set(), set())
        """Hashes of the training requests as they are, and in one case."""
        self._tested: list[tuple[bytes, bytes, str]] = []
        """The same hashes of each request of the test, and its place."""
        self._has_tools: defaultdict[str, dict[bool, Tally]] = defaultdict(lambda: {True: Tally(), False: Tally()})
        """{file: {whether its chats have tools: chats}}."""
        self._conflicts, self._forbidden, self._unmatched = Tally(), Tally(), ""
        self._called: Counter[tuple[str, bool]] = Counter()
        """{(file, whether it is the test): requests that are answered by calls}."""
        self._refused: defaultdict[tuple[str, bool], list[bytes]] = defaultdict(list)
        """Hashes of the other requests."""

    def add(self, chat: Chat, file: str, is_test: bool) -> None:
        """Count a chat of `file`."""
        last = _last_answer(chat)
        self._has_tools[file][bool(chat.tools)].add(chat.place)
        for tool in chat.tools:
            function = tool["function"]
            properties = (function.get("parameters") or {}).get("properties")
            if isinstance(properties, dict):
                self._properties[function["name"]] = {**self._properties.get(function["name"], {}), **properties}
        text = "\n".join(message["content"] for message in chat.messages[:last])
        same, folded = digest(text), digest(" ".join(text.casefold().split()))
        if is_test:
            self._tested.append((same, folded, chat.place))
        else:
            self._trained[0].add(same)
            self._trained[1].add(folded)
            self._add_answer(digest(request_of(chat)), digest(json.dumps(chat.messages[last])), chat.place)
        if chat.messages[last].get("tool_calls"):
            self._called[file, is_test] += 1
        elif chat.messages[last - 1]["role"] == "user":
            self._refused[file, is_test].append(same)
        for message in chat.messages:
            for call in message.get("tool_calls", ()):
                self._add_call(call["function"], text, chat, is_test)

    def _add_answer(self, request: bytes, answer: bytes, place: str) -> None:
        known = self._answers.setdefault(request, answer)
        if known is not None and known != answer:
            self._answers[request] = None
            self._conflicts.add(place)

    def _add_call(self, call: Mapping[str, Any], request: str, chat: Chat, is_test: bool) -> None:
        name, arguments = call["name"], call["arguments"]
        self._shapes[name, tuple((key, type_of(value)) for key, value in arguments.items())].add(chat.place)
        counts = self._functions[name]
        counts.num_calls[is_test] += 1
        texts = [value for value in arguments.values() if isinstance(value, str)]
        counts.num_texts += len(texts)
        counts.num_copied += sum(each.casefold() in request.casefold() for each in texts)
        for key, value in arguments.items() if not is_test else ():
            values = self._values[name, key]
            values[""] += 1
            if len(values) <= 2:
                values[json.dumps(value)] += 1
        if is_test and chat.tools and not self._unmatched:
            try:
                if reason := why_not_called(call, chat.tools):
                    self._forbidden.add(f"{chat.place}: {reason}")
            except MissingExtraError as error:
                self._unmatched = f"the answers of the test are not compared with their tools: {error}"
            except UsageError as error:
                self._forbidden.add(f"{chat.place}: {error}")

    def lines(self) -> list[str]:
        """Return a line with a count and an example for each finding."""
        found = self._of_calls()
        found["requests have two different answers"] = self._conflicts
        found["calls of the test do not follow their own tools, so that --constrain schema cannot write them"] = (
            self._forbidden
        )
        for same, folded, place in self._tested:
            if folded in self._trained[1]:
                other = ", in another case or spacing" * (same not in self._trained[0])
                found[f"requests of the test are in the training files{other}"].add(place)
        for file, tallies in self._has_tools.items():
            total = tallies[True].count + tallies[False].count
            if tallies[True].count:
                found[f"of {total:,} chats in {file} have no tools"] = tallies[False]
        for (name, key), values in self._values.items():
            schema = self._properties.get(name, {}).get(key)
            is_fixed = isinstance(schema, dict) and ("const" in schema or len(schema.get("enum") or ()) == 1)
            if values[""] >= FEWEST_CALLS and len(values) == 2 and not is_fixed:
                shown = f"{name}({key}: {next(value for value in values if value)}) in {values['']:,} calls"
                found["arguments have one value in the training files, and the model will write no other"].add(shown)
        return [*lines_of(found), *self._of_refusals(), *([self._unmatched] if self._unmatched else [])]

    def _of_refusals(self) -> list[str]:
        """Return a line for each training file with too few requests without a call, or that repeats them."""
        found = []
        for (file, is_test), calls in self._called.items():
            refused = self._refused[file, is_test]
            shown = f"{len(refused):,} of {len(refused) + calls:,} requests in {file} have no call"
            if is_test or calls < FEWEST_CALLS:
                continue
            if len(refused) < FEWEST_REFUSALS * (len(refused) + calls):
                found.append(f"{shown}, so the model will call functions for what fits none")
            elif len({*refused}) < len(refused) / 2:
                found.append(f"{shown}, and only {len({*refused}):,} of these are different")
        return found

    def _of_calls(self) -> defaultdict[str, Tally]:
        """Return the findings about order, types and names of arguments."""
        found: defaultdict[str, Tally] = defaultdict(Tally)
        by_count = sorted(self._shapes.items(), key=lambda item: -item[1].count)
        order: defaultdict[str, dict[str, str]] = defaultdict(dict)
        """{function: {argument: its type}} in the order of the properties, or else of the most frequent calls."""
        for name, properties in self._properties.items():
            for key, schema in properties.items():
                kind = schema.get("type") if isinstance(schema, dict) else None
                order[name][key] = TYPES.get(kind, "") if isinstance(kind, str) else ""
        for (name, shape), _ in by_count:
            for key, kind in shape:
                if kind != "null" and not order[name].get(key):
                    order[name][key] = kind
        for (name, shape), calls in by_count:
            keys = [key for key, _ in shape]
            shown = f"{name}({', '.join(keys)}) in {calls.example}"
            known = self._properties.get(name)
            if self._properties and known is None:
                found["calls of functions that no tools have"].add(shown, calls.count)
            if known is not None and not known.keys() >= set(keys):
                found["calls with arguments that no tools have"].add(shown, calls.count)
            if keys != sorted(keys, key=[*order[name]].index):
                found["calls with arguments in another order than the properties or most calls"].add(shown, calls.count)
            wrong = [key for key, kind in shape if kind not in ("null", order[name].get(key, kind))]
            if wrong:
                shown = f"{name}({wrong[0]}: {dict(shape)[wrong[0]]}) in {calls.example}"
                found["calls with an argument of another type than its schema or most calls"].add(shown, calls.count)
        return found

    def rows(self) -> list[list[str]]:
        """Return a table with a row for each function, [] without calls."""
        names = sorted(self._functions, key=lambda name: -self._functions[name].num_calls.total())
        table = [["function", "training", "--test", "texts in the request"]]
        for name in names[:MOST_ROWS]:
            each = self._functions[name]
            share = f"{each.num_copied / each.num_texts:.0%} of {each.num_texts:,}" if each.num_texts else "-"
            table.append([name, f"{each.num_calls[False]:,}", f"{each.num_calls[True]:,}", share])
        counts = Counter({key: len(self._refused[key]) for key in self._called})
        refused = [sum(count for (_, is_test), count in counts.items() if is_test == part) for part in (False, True)]
        table.append(["no call", *map("{:,}".format, refused), "-"])
        if len(names) > MOST_ROWS:
            table.append([f"{len(names) - MOST_ROWS} more", "", "", ""])
        return table if names else []
