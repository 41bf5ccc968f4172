"""Convert records to documents: the fields of a JSON object or of a table's row.

RECORD_FORMS lists the forms besides a text field. Chats keep their functions and calls in OpenAI's form. A record that
is not understood is refused by the name of its field.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...runtime.base.errors import DataError
from ...runtime.base.quantities import did_you_mean
from ...runtime.chat_template import Message
from ...runtime.tool_format import FUNCTION_NAME
from .chat import Chat, Document

_log = logging.getLogger("efficientllm.train")

OLDER_FIELDS = {"functions": "tools", "function_call": "tool_calls"}
"""OpenAI's older fields for functions and calls, and the fields that replace them."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""OpenAI's roles, and their names in chat templates."""

TEXT_FIELD = "text"
"""The field of texts unless the user names another one."""

SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"function_call": "call", "observation": "tool", "tool": "tool"},
}
"""Values of "from" in ShareGPT's records. "call" is an assistant's message whose value is a call in JSON."""


class EmptyAnswerError(DataError):
    """An answer without text and calls."""


class BadLines:
    """Counts the malformed records of one reading of a corpus."""

    def __init__(self, allowed: int, silent: bool = False, flag: str = "--data") -> None:
        """Allow `allowed` records. `flag` named the corpus. `silent` logs nothing."""
        self.allowed = allowed
        self._flag = flag
        self.count = 0
        self._silent = silent

    def add(self, error: DataError) -> None:
        """Count and log a record that is skipped. Raises DataError if it is one more than allowed."""
        self.count += 1
        if self.count > self.allowed:
            hint = ""
            if not self.allowed and self._flag == "--data":
                hint = "; --skip-bad-lines N leaves out up to N such lines"
            raise DataError(f"{error}{hint}") from error
        if not self._silent:
            _log.warning(f"skipped: {error}")


FIELD_FLAGS = ("--data", "FILE", "--test")
"""Arguments that name a corpus of the commands with --text-field."""


@dataclass(frozen=True)
class ReadContext:
    """The settings of a reading, and the errors that name its input."""

    name: str
    """The path or dataset as the user typed it, or the path of a file within a folder."""
    field: str
    """JSON field or table column that holds the text."""
    bad_lines: BadLines

    flag: str = "--data"
    """Flag that named the input."""
    job: str = ""
    """Name of the job of its chats."""

    @property
    def field_hint(self) -> str:
        """Return the flag that reads another field, "" for commands without it."""
        return " (--text-field NAME reads another)" if self.flag in FIELD_FLAGS else ""

    def error(self, reason: str, kind: type[DataError] = DataError) -> DataError:
        return kind(f"{self.flag} {self.name}: {reason}")

    def missing(self, place: str, names: Iterable[str]) -> DataError:
        """Return the error of a place whose fields or columns, `names`, lack the text field."""
        shown = list(itertools.islice(names, 12))
        known = [self.field, *(form.field for form in RECORD_FORMS)]
        hint = "".join(did_you_mean(name, known) for name in shown)
        return self.error(f'{place} "{self.field}"; it has {", ".join(shown) or "none"}{self.field_hint}{hint}')

    def not_utf8(self, error: UnicodeDecodeError, place: str = "") -> DataError:
        """Return the error of bytes that are not UTF-8, with the encoding that they seem to have."""
        if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return self.error(f"{place}not UTF-8 but UTF-16; convert it: iconv -f utf-16 -t utf-8")
        if b"\0" in error.object:
            return self.error(f"{place}not UTF-8 but binary; give a text file")
        return self.error(f"{place}not UTF-8 ({error.reason}); convert it, as with: iconv -f latin1 -t utf-8")


def document_of(context: ReadContext, record: Any, place: str) -> Document:
    """Return the document of one record: the chat of its form, or its text field.

    `place` names the record in errors. Raises DataError for a record of no known form or with malformed values.
    """
    field = context.field
    if not isinstance(record, dict):
        raise context.error(f'{place} is not a JSON object with a "{field}" field')
    has_text = record.get(field) is not None
    if form := form_of([name for name in record if record[name] is not None or not has_text], field):
        chat = form.parse(context, record, place).in_job(context.job)
        return replace(chat, form=form.name, place=f"{context.name}: {place}")
    if context.job:
        raise context.error(f"{place} holds text, and the examples of the job {context.job} are chats")
    if field not in record:
        raise context.missing(f"{place} has no field", record)
    if not isinstance(record[field], str):
        raise context.error(f'the "{field}" of {place} is not a string{context.field_hint}')
    return _checked_unicode(context, record[field], f'the "{field}" of {place}')


def _checked_unicode(context: ReadContext, text: str, name: str) -> str:
    """Return the text. Raises DataError for an escaped lone surrogate, which tokenizers reject."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise context.error(f"{name} is not Unicode: {error.reason}") from error
    return text


def _chat(context: ReadContext, record: Mapping[str, Any], messages: list[Message], place: str) -> Chat:
    """Return a chat of checked messages with the record's functions. Raises DataError without an answer."""
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise context.error(f"{place} has no answer to learn: no message has the role assistant and a weight of 1")
    chat = Chat(tuple(messages), _tools(context, record, place), record.get("cut") is True)
    _checked_unicode(context, chat.to_json(), place)
    return chat


def _tools(context: ReadContext, record: Mapping[str, Any], place: str) -> tuple[dict[str, Any], ...]:
    """Return the functions of a record in OpenAI's form. A list in JSON text is accepted, as in tables."""
    _refuse_older_field(context, record, "functions", place)
    tools = record.get("tools") or ()
    if isinstance(tools, str):
        tools = _parsed(context, tools, f'the "tools" of {place}')
    malformed = f'the "tools" of {place} must be a list of {{"type": "function", "function": {{"name": ..., ...}}}}'
    if not isinstance(tools, list | tuple):
        raise context.error(malformed)
    found = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None  # some write the function alone
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise context.error(malformed)
        parameters = function.get("parameters")
        if isinstance(parameters, str):  # as in tables
            parameters = _parsed(context, parameters, f'the "parameters" of a function of {place}')
            function = {**function, "parameters": parameters}
        if not isinstance(parameters, dict | None):
            raise context.error(f'the "parameters" of a function of {place} must be a JSON schema, which is an object')
        if not re.fullmatch(FUNCTION_NAME, function["name"]):
            allowed = "use at most 128 letters, digits, dots, _ and -, as the server does"
            raise context.error(f"{place} has a function {function['name']!r}; {allowed}")
        if any(function["name"] == each["function"]["name"] for each in found):
            raise context.error(f"{place} has two functions {function['name']}; rename one")
        found.append({"type": "function", "function": function})
    return tuple(found)


def _message(context: ReadContext, message: Any, place: str) -> Message:
    """Return a message in OpenAI's form with text as content and calls whose arguments are objects."""
    malformed = context.error(f'{place} must be {{"role": ..., "content": ...}}')
    if not isinstance(message, dict):
        raise malformed
    _refuse_older_field(context, message, "function_call", place)
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise context.error(f'{place} has the "weight" {weight!r}; give 0 for an answer that is not learned, or 1')
    own = {"weight": 0} if weight == 0 else {}
    role, content, calls = message.get("role"), _joined(message.get("content", "missing")), message.get("tool_calls")
    if not isinstance(role, str):
        raise malformed
    if role == "function":
        raise context.error(f'{place} has the "role" function; name it tool')
    if role not in ROLES:
        raise context.error(f'{place} has the "role" {role}; known are {", ".join(ROLES)}')
    role = ROLES[role]
    if calls:
        if role != "assistant":
            raise context.error(f'{place} has "tool_calls", which only an assistant\'s message can have')
        if not isinstance(calls, list):
            raise context.error(f'the "tool_calls" of {place} must be a list')
        calls = [_call(context, call, f"a call in {place}") for call in calls]
        # OpenAI writes null as the content beside calls
        content = "" if content is None or "content" not in message else content
        if not isinstance(content, str):
            raise context.error(f'the "content" of {place} must be a text')
        return {"role": role, "content": content, "tool_calls": calls, **own}
    if content is None:
        error = f'{place} has a "content" that is null; give it a text, or remove the record'
        raise context.error(error, EmptyAnswerError if role == "assistant" else DataError)
    if "content" not in message:
        raise malformed
    if not isinstance(content, str):
        raise context.error(f'the "content" of {place} must be a text or parts of text; write JSON as text, too')
    if role == "assistant" and not content.strip():
        error = f'{place} has an empty "content", which is no answer; give it a text, or remove the record'
        raise context.error(error, EmptyAnswerError)
    return {"role": role, "content": content, **own}


def _joined(content: Any) -> Any:
    """Return the text of OpenAI's list of text parts, and any other content as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts = [part["text"] for part in content if part.get("type") == "text" and isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else content


def _call(context: ReadContext, call: Any, place: str) -> dict[str, Any]:
    """Return a call in OpenAI's form. Arguments may be JSON text, as OpenAI writes them, or an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise context.error(f'{place} must be {{"function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(context, arguments or "{}", f'the "arguments" of {place}')
    if not isinstance(arguments, dict):
        raise context.error(f'the "arguments" of {place} must be an object')
    try:
        json.dumps(arguments, allow_nan=False)
    except ValueError as error:
        raise context.error(f'the "arguments" of {place} have NaN or Infinity, which JSON does not have') from error
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _refuse_older_field(context: ReadContext, values: Mapping[str, Any], name: str, place: str) -> None:
    if values.get(name):
        raise context.error(f'{place} has the older field "{name}"; convert it to "{OLDER_FIELDS[name]}"')


def _parsed(context: ReadContext, text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise context.error(f"{name} is not JSON: {error}") from error


def _openai_chat(context: ReadContext, record: Mapping[str, Any], place: str) -> Chat:
    """Return the chat of OpenAI's fine-tuning format: messages, and functions in `tools`."""
    messages = record["messages"]
    if not isinstance(messages, list):
        raise context.error(f'the "messages" of {place} must be a list of {{"role": ..., "content": ...}}')
    checked = [_message(context, each, f"message {number} of {place}") for number, each in enumerate(messages, 1)]
    return _chat(context, record, checked, place)


def _sharegpt_chat(context: ReadContext, record: Mapping[str, Any], place: str) -> Chat:
    """Return the chat of ShareGPT's format: conversations of {"from": ..., "value": ...}."""
    turns = record["conversations"]
    malformed = f'the "conversations" of {place} must be a list of {{"from": ..., "value": ...}}'
    if not isinstance(turns, list):
        raise context.error(malformed)
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise context.error(malformed)
        role = SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise context.error(f'{place} has a turn "from" {turn.get("from")!r}; known are {known}')
        if role == "call":
            calls = _parsed(context, turn["value"], f"a call of {place}")
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": turn["value"]})
    checked = [_message(context, each, f"turn {number} of {place}") for number, each in enumerate(messages, 1)]
    return _chat(context, record, checked, place)


def _completion(context: ReadContext, record: Mapping[str, Any], place: str) -> Chat:
    """Return the chat of a prompt and its completion: texts, or lists of messages."""
    if record.get("completion") is None:
        raise context.error(f'{place} has a "prompt" without a "completion"')
    sides = {"prompt": "user", "completion": "assistant"}
    messages = []
    for name, role in sides.items():
        value = record[name]
        messages += value if isinstance(value, list) else [{"role": role, "content": value}]
    return _chat(context, record, [_message(context, each, f"a message of {place}") for each in messages], place)


def _alpaca(context: ReadContext, record: Mapping[str, Any], place: str) -> Chat:
    """Return the chat of Alpaca's format: an instruction with an optional input, and an output."""
    if record.get("output") is None:
        raise context.error(f'{place} has an "instruction" without an "output"')
    question = record["instruction"]
    if record.get("input"):
        if not isinstance(question, str) or not isinstance(record["input"], str):
            raise context.error(f'the "instruction" and the "input" of {place} must be texts')
        question = f"{question}\n\n{record['input']}"
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    return _chat(context, record, [_message(context, each, f"a message of {place}") for each in messages], place)


@dataclass(frozen=True)
class RecordForm:
    """A form of record that holds a chat in other fields than a text."""

    name: str
    field: str
    """Field by which a record of this form is recognised."""
    needs: str
    """Field that a record with a text needs as well to be of this form, "" if none."""
    other_fields: tuple[str, ...]
    """Further columns of a table that `parse` reads."""
    parse: Callable[[ReadContext, dict[str, Any], str], Chat]
    """Function that returns the chat of a record and raises DataError. It gets the record's place for errors."""


RECORD_FORMS = (
    RecordForm("chat", "messages", "", ("tools", "functions"), _openai_chat),
    RecordForm("ShareGPT", "conversations", "", ("tools", "system"), _sharegpt_chat),
    RecordForm("prompt and completion", "prompt", "completion", ("completion", "tools"), _completion),
    RecordForm("Alpaca", "instruction", "output", ("input", "output", "system"), _alpaca),
)
"""Forms in the order in which they are tried."""


def form_of(names: Collection[str], field: str) -> RecordForm | None:
    """Return the form of a record with the fields `names`, None if its text field is read.

    A chat that is also there as a text, as in Alpaca's data, is a chat unless the user named the text field.
    """
    if field in names and field != TEXT_FIELD:
        return None
    for form in RECORD_FORMS:
        if form.field in names and (field not in names or not form.needs or form.needs in names):
            return form
    return None
