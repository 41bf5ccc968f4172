"""The examples of a job, and the metrics that score an answer to one of them.

A metric returns one or more values in [0, 1] for an answer. The first one is its score.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.base.errors import UsageError
from ...runtime.base.extras import extra
from ...runtime.chat_template import Message
from ...runtime.grammar import answer_schema
from ..data.chat import Chat

FORM = "response_format"
"""Field of a record with the form of its answer."""

RESPONSE_FORMAT = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
"""Value of that field, as in OpenAI's requests."""

Values = dict[str, float]
"""{name: value in [0, 1]}; NaN if the value does not apply to the example."""


@dataclass(frozen=True)
class Example:
    """A held-out example of a job."""

    chat: Chat
    """The conversation with the expected answer as its last message."""
    record: Mapping[str, Any]
    """The whole record, for metrics that read further fields."""

    @property
    def expected(self) -> str:
        """Return the expected answer as text. Calls are JSON."""
        return text_of(self.chat.messages[-1])

    @property
    def references(self) -> list[str]:
        """Return all right answers: the expected one and those of the field `references`."""
        return [self.expected, *(self.record.get("references") or ())]

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """Return the schema that the record's `response_format` restricts answers to, as in the server; None without.

        The form is that of OpenAI's requests. Raises ValueError for another one, and UsageError for deep nesting.
        """
        given = self.record.get(FORM)
        if given is None:
            return None
        try:
            schema = given["json_schema"]["schema"] if given["type"] == "json_schema" else None
        except (TypeError, KeyError):
            schema = None
        if not isinstance(schema, dict):
            raise ValueError(f"response_format must be {RESPONSE_FORMAT}")
        return answer_schema(schema, given["json_schema"].get("strict") is True)

    @property
    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the (name, arguments) of the expected calls. In the content, only functions in `tools` count."""
        message = self.chat.messages[-1]
        if "tool_calls" in message:
            return calls_in(text_of({**message, "content": ""}))
        names = self.functions
        return [each for each in calls_in(message["content"]) if not names or each[0] in names]

    @property
    def functions(self) -> set[str]:
        """Return the names of the functions that may be called, none if the example lists none."""
        return {tool["function"]["name"] for tool in self.chat.tools}

    @property
    def prompt(self) -> Chat:
        """Return the conversation before the expected answer."""
        return Chat(self.chat.messages[:-1], self.chat.tools)


def text_of(message: Message) -> str:
    """Return content and calls of a message. Calls are JSON, one a line."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    texts = [message["content"]] if message["content"] else []
    return "\n".join([*texts, *calls])


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_no_constant)
"""Reads 1.0 as 1, so that the same numbers have the same canonical text. Refuses NaN and Infinity."""


def _canonical(value: Any) -> str:
    """Return the text of a JSON value, so that true is not 1."""
    return json.dumps(value, sort_keys=True)


def calls_in(text: str, functions: Collection[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return the (name, arguments) of all calls in an answer.

    A call is a JSON object with a name and arguments (or parameters), or a name before a JSON object, as templates
    write them. An object with a name alone is the arguments of a name right before it. A word with a space before an
    object is a name if `functions` have it or are empty. Other objects are ignored.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    position = text.find("{")
    while position >= 0:
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            position = text.find("{", position + 1)
            continue
        if isinstance(value, dict):
            arguments = _arguments(value.get("arguments", value.get("parameters")))
            is_named = isinstance(value.get("name"), str) and isinstance(arguments, dict | None)
            # right before the object, or not the key of one that is cut
            between = r"(?<=\w)[\s(]*" if is_named else r"(?!\"\s*:)\W*"
            if is_named and arguments is not None:
                found.append((value["name"], arguments))
            elif (name := re.search(rf"([A-Za-z_][\w.-]*)({between})$", text[:position])) and (
                not functions or name[1] in functions or name[2] in ("", "(")
            ):
                found.append((name[1], value))
            elif is_named and (name is None or value["name"] in functions):
                found.append((value["name"], {}))
        position = text.find("{", end)
    return found


def _arguments(value: Any) -> Any:
    """Return arguments as an object if they are its JSON text, as OpenAI writes them."""
    if not isinstance(value, str):
        return value
    try:
        return _DECODER.decode(value)
    except (ValueError, RecursionError):
        return value


def _normalised(text: str) -> str:
    return " ".join(text.split())


def exact(answer: str, example: Example) -> Values:
    """Return 1 if the answer equals a reference except for white space."""
    return {"exact": float(_normalised(answer) in map(_normalised, example.references))}


def contains(answer: str, example: Example) -> Values:
    """Return 1 if the answer contains a reference, ignoring case and white space."""
    text = _normalised(answer).casefold()
    return {"contains": float(any(_normalised(each).casefold() in text for each in example.references))}


def json_value(answer: str, example: Example) -> Values:
    """Return whether the answer is the expected JSON value, the F1 of an object's fields, and whether it is JSON."""
    expected = _DECODER.decode(example.expected)
    wanted = Counter(_fields(expected)) if isinstance(expected, dict) else Counter[Any]()
    try:
        value = _DECODER.decode(answer)
    except (ValueError, RecursionError):  # an answer that repeats itself has thousands of brackets
        return {"exact": 0.0, "field_f1": 0.0 if wanted else math.nan, "valid_json": 0.0}
    given = Counter(_fields(value)) if isinstance(value, dict) else Counter[Any]()
    return {
        "exact": float(_canonical(value) == _canonical(expected)),
        "field_f1": _f1(wanted, given) if wanted else math.nan,
        "valid_json": 1.0,
    }


def call(answer: str, example: Example) -> Values:
    """Compare calls: exact match, function names, F1 of the arguments, and whether a call can be read.

    An example without a call expects a refusal, which is right if the answer has no call. After a result it expects
    its text, in any case.
    """
    expected, found = example.calls, calls_in(answer, example.functions)
    if not expected:
        refused = float(not found)
        if len(example.chat.messages) > 1 and example.chat.messages[-2]["role"] == "tool":
            texts = [_normalised(each).casefold() for each in (answer, *example.references)]
            same = float(texts[0] in texts[1:])
            return {"exact": same, "function": refused, "after_result": same}
        return {"exact": refused, "function": refused, "argument_f1": math.nan, "valid": math.nan, "refused": refused}
    wanted, given = (Counter(field for _, each in calls for field in _fields(each)) for calls in (expected, found))
    return {
        "exact": float(_canonical(expected) == _canonical(found)),
        "function": float([name for name, _ in expected] == [name for name, _ in found]),
        "argument_f1": _f1(wanted, given) if wanted or given else float(bool(found)),
        "valid": float(bool(found)),
        "refused": math.nan,
    }


def _fields(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        yield name, _canonical(value)


def _f1(wanted: Counter[Any], given: Counter[Any]) -> float:
    return 2 * (wanted & given).total() / (wanted.total() + given.total())


def label(answer: str, example: Example) -> Values:
    """Return 1 if the first line of the answer is the expected label, ignoring case."""
    return {"accuracy": float(_label(answer) == _label(example.expected))}


def _label(answer: str) -> str:
    lines = answer.strip().splitlines()
    return _normalised(lines[0] if lines else "").casefold()


def macro_f1(expected: Sequence[str], answers: Sequence[str]) -> float:
    """Return the mean over all expected labels of the F1 of each label."""
    pairs = [(_label(one), _label(other)) for one, other in zip(expected, answers, strict=True)]
    right = Counter(one for one, other in pairs if one == other)
    wanted, given = (Counter(label) for label in zip(*pairs, strict=True))
    return statistics.fmean(2 * right[label] / (wanted[label] + given[label]) for label in wanted)


def chrf(answer: str, example: Example) -> Values:
    """Return chrF (Popovic 2015) against all references, by sacrebleu."""
    with extra("eval", "sacrebleu"):
        import sacrebleu
    return {"chrf": sacrebleu.sentence_chrf(answer, example.references).score / 100}


def rouge(answer: str, example: Example) -> Values:
    """Return the F-measure of ROUGE-L (Lin 2004) against the best reference, by rouge-score."""
    with extra("eval", "rouge-score"):
        from rouge_score import rouge_scorer
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return {"rouge_l": max(scorer.score(each, answer)["rougeL"].fmeasure for each in example.references)}


Metric = Callable[[str, Example], Values]
METRICS: dict[str, Metric] = {
    "exact": exact,
    "contains": contains,
    "json": json_value,
    "call": call,
    "label": label,
    "chrf": chrf,
    "rouge": rouge,
}
"""Values of `--metric`, besides python:MODULE:FUNCTION."""


def metric_named(name: str) -> Metric:
    """Return a metric of METRICS, or a function (answer, record) -> number of a module.

    The module may lie in the working folder. Raises UsageError with the known names.
    """
    if name in METRICS:
        return METRICS[name]
    kind, _, target = name.partition(":")
    module, _, function = target.partition(":")
    if kind != "python" or not function:
        raise UsageError(f"--metric {name}: known are {', '.join(METRICS)} and python:MODULE:FUNCTION")
    if "" not in sys.path:  # last, so that no file there replaces an installed module
        sys.path.append("")
    try:
        score = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of the user's may raise anything
        reason = str(error) if isinstance(error, ImportError | AttributeError) else repr(error)
        raise UsageError(f"--metric {name}: cannot be imported: {reason}") from error
    return lambda answer, example: {function: float(score(answer, dict(example.record)))}
