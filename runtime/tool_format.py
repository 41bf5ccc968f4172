"""Find the format in which a model writes function calls: that of its chat template, or a generic one."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from .base.errors import EfficientLLMError
from .chat_template import Message, names_in, render_chat
from .copied_arguments import CopiedArguments
from .engines.scheduler import EngineScheduler
from .grammar import CALL_JSON, LENIENT_CALL_JSON, Grammar, closed_schema, embedded_schema, schema_part
from .spaced_texts import ObjectScanner, schema_with_spaces, with_spaces

MAX_CALLS = 16
"""Largest number of calls in one answer, because a small model may repeat calls without end."""

FUNCTION_NAME = "[a-zA-Z0-9_.-]{1,128}"
"""Regular expression of the names of functions."""

INSTRUCTIONS = """You can call functions. They are, one JSON object a line:
{tools}
To call one, answer with its name and arguments and nothing else:
<tool_call>
{{"name": "function name", "arguments": {{"parameter": "value"}}}}
</tool_call>"""
"""System prompt for models whose template has no functions, in the format of Hermes and Qwen."""


@dataclass(frozen=True)
class ToolFormat:
    """The format BEGIN name MIDDLE arguments (BETWEEN name MIDDLE arguments)* END. Arguments are a JSON object."""

    begin: str
    middle: str
    between: str
    """Empty if an answer can have one call only."""
    end: str
    is_from_template: bool = True
    """True if the chat template describes functions, writes earlier calls and has the role tool."""
    is_learned: bool = False
    """True if the model was trained on its functions and needs no description of them in the prompt."""
    has_spaced_texts: bool = False
    """True if texts in arguments begin with a space, which is no part of them."""
    given: frozenset[str] = frozenset()
    """Those of `tools`, `tool` (the role) and `tool_calls` that a learned template of a job's own names and gets."""
    writes_calls: bool = False
    """True if such a template writes calls itself. Otherwise they are part of the content."""

    def readable_by(self, engine: EngineScheduler) -> tuple[tuple[int, ...], ToolFormat] | None:
        """Return the control tokens at the start of calls, and the format without control tokens.

        The text of an answer has no control tokens. Return None if no text remains that marks a call.
        """
        tokens = engine.tokenize(self.begin, special=True)
        num_control = sum(not engine.token_bytes(token) for token in tokens)
        begin = engine.text_of(tokens)
        is_readable = begin.strip() and self.begin.endswith(begin) and _is_plain(engine, self.middle)
        if not is_readable or any(engine.token_bytes(token) for token in tokens[:num_control]):
            return None
        between = self.between if _is_plain(engine, self.between) else ""
        end_tokens = engine.tokenize(self.end, special=True)
        end = engine.text_of(itertools.takewhile(engine.token_bytes, end_tokens))  # up to a control token
        return tuple(tokens[:num_control]), replace(self, begin=begin, between=between, end=end)

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        control: Sequence[int],
        *,
        must_call: bool,
        otherwise: Mapping[str, Any] | None = None,
        copied: CopiedArguments | None = None,
    ) -> Grammar:
        """Return the grammar of calls of `tools`, in OpenAI's form, with arguments that follow their schemas.

        Without `must_call`, the answer may also be text, or text that ends with calls. With a schema `otherwise`, it is
        JSON of that schema, or calls. Calls begin with the tokens `control`. With `copied`, it writes the arguments.
        Its `GrammarConstraint` raises UsageError with the name of the tool if its schema cannot be enforced. Keywords
        that cannot be enforced are ignored unless a function is strict.
        """
        functions = [tool["function"] for tool in tools]
        lines = self._frame(len(functions), control, must_call, otherwise)
        formats = [CALL_JSON if each.get("strict") else LENIENT_CALL_JSON for each in functions]
        parts = [
            schema_part(parameters_of(each), f"tool {each['name']!r}: parameters", format)
            for each, format in zip(functions, formats, strict=True)
        ]
        parts += [schema_part(otherwise, "json_schema")] if otherwise is not None else []
        if copied or self.has_spaced_texts:
            for part in parts:
                part.checked()
        for index, (function, format) in enumerate(zip(functions, formats, strict=True)):
            opening = json.dumps(function["name"] + self.middle)
            parameters = parameters_of(function)
            if self.has_spaced_texts:
                parameters = schema_with_spaces(parameters)
            if copied:
                arguments = copied.add(f"call_{index}", parameters, format)
            else:
                arguments = embedded_schema(parameters, format)
            lines.append(f"call_{index}: {opening} {arguments}")
        lines += copied.rules if copied else []
        return Grammar("\n".join(lines) + "\n", "tools", tuple(parts)).bounded()

    def _frame(
        self, num_functions: int, control: Sequence[int], must_call: bool, otherwise: Mapping[str, Any] | None
    ) -> list[str]:
        """Return the rules around the calls, see `grammar`. Those of each call_INDEX are missing."""
        has_text = not must_call and otherwise is None
        first = "".join(f"<[{token}]> " for token in control) + json.dumps(self.begin)
        if not has_text:
            head = f"head: {first}"
        elif control:  # no text has a control token, so the call's begin is found without a lazy rule
            head = f"head: TEXT {first}"
        else:  # lazy: the text ends at the start of the first call
            head = f"head[lazy]: TEXT {first}"
        if must_call:
            start = "start: calls"
        elif has_text:
            start = "start: TEXT | calls"
        else:
            start = "start: object | calls"
        calls = "calls: head call"
        if self.between:
            calls += " (BETWEEN call){0,%d}" % (MAX_CALLS - 1)  # noqa: UP031  braces
        if self.end:
            calls += " END"
        alternatives = " | ".join(f"call_{index}" for index in range(num_functions))
        lines = ["%llguidance {}", start, calls, head, f"call: {alternatives}"]
        if has_text:
            lines.append(r"TEXT: /(.|\n)*/")
        if otherwise is not None:
            lines.append(f"object: {embedded_schema(otherwise)}")
        if self.between:
            lines.append(f"BETWEEN: {json.dumps(self.between)}")
        if self.end:
            lines.append(f"END: {json.dumps(self.end)}")
        return lines

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Return earlier `calls` as text in this format."""
        parts: list[str] = []
        for call in calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            arguments = with_spaces(arguments) if self.has_spaced_texts else arguments
            parts.append(f"{name}{self.middle}{json.dumps(arguments, ensure_ascii=False)}")
        return self.begin + self.between.join(parts) + self.end

    def plain(self, answer: str) -> str:
        """Return an answer in this format without the spaces before its texts."""
        return ObjectScanner().push(answer) if self.has_spaced_texts else answer


GENERIC = ToolFormat(
    '<tool_call>\n{"name": "',
    '", "arguments": ',
    '}\n</tool_call>\n<tool_call>\n{"name": "',
    "}\n</tool_call>",
    is_from_template=False,
)
"""The format that most open models were trained on."""


LEARNED = ToolFormat(
    '{"name": "',
    '", "arguments": ',
    '}\n{"name": "',
    "}",
    is_from_template=False,
    is_learned=True,
    has_spaced_texts=True,
)
"""The short format of a model that was trained on its functions: one JSON object a line."""

LEARNED_MARK = "{#- efficientllm: the model was trained on its functions, with spaced texts -#}"
"""Start of the chat template of such a model."""

JOB_MARK = "{#- efficientllm: the job's own template, and the model was trained on its functions -#}"
"""Start of a template that gets functions, results and calls where it names them (see `ToolFormat.given`)."""

LEARNED_MARKS = (LEARNED_MARK, JOB_MARK)


def parameters_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a function's arguments, a closed object. Without parameters it has no properties."""
    return closed_schema({**(function.get("parameters") or {"properties": {}}), "type": "object"})


def why_not_called(call: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> str:
    """Return why the grammar of `tools` does not allow `call`, {"name": ..., "arguments": {...}}; "" if it does.

    Raises UsageError for a schema that cannot be enforced.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if call["name"] not in functions:
        return f"{call['name']} is none of its tools"
    schema = parameters_of(functions[call["name"]])
    part = schema_part(schema, call["name"], LENIENT_CALL_JSON)
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    start = part.allowed_start(arguments)
    others = [name for name in call["arguments"] if name not in schema.get("properties", {})]
    if start is not None and others and schema.get("additionalProperties") is False:
        return f'{call["name"]} takes no argument "{others[0]}"'
    return "" if start is None else f"{call['name']} takes no {arguments[len(start) :]} after {start or 'its name'}"


def _is_plain(engine: EngineScheduler, text: str) -> bool:
    """Return True if `text` has no control token."""
    return all(map(engine.token_bytes, engine.tokenize(text, special=True)))


@lru_cache(maxsize=16)
def tool_format(template: str | None, bos_token: str, eos_token: str) -> ToolFormat:
    """Return the format of a chat template, found by rendering example calls, or GENERIC if it writes none."""
    if template and template.startswith(LEARNED_MARK):
        return LEARNED
    is_job = bool(template) and template.startswith(JOB_MARK)
    given = GIVEN & names_in(template) if is_job else frozenset[str]()
    found = None
    if not is_job or "tool_calls" in given:
        with contextlib.suppress(EfficientLLMError):  # the template refuses messages with calls
            found = _TemplateProbe(template, bos_token, eos_token).format(is_described=not is_job)
    if not is_job:
        return found or GENERIC
    is_written = found is not None
    return replace(found or LEARNED, is_from_template=False, is_learned=True, given=given, writes_calls=is_written)


GIVEN = frozenset({"tools", "tool", "tool_calls"})
"""Names of which a job's own template gets what it names."""

_NAMES = ("first_probe", "second_probe")
_ARGUMENTS = {"probe_argument": "probe_value"}
_TEXT = "What the probe says."
_PARAMETERS = {
    "type": "object",
    "properties": {"probe_argument": {"type": "string", "description": "A text."}},
    "required": ["probe_argument"],
}
_TOOL = {"type": "function", "function": {"name": _NAMES[0], "description": "A probe.", "parameters": _PARAMETERS}}


def _call(name: str) -> dict[str, Any]:
    return {"id": "call00000", "type": "function", "function": {"name": name, "arguments": dict(_ARGUMENTS)}}


class _TemplateProbe:
    """Renders example calls with a template."""

    def __init__(self, template: str | None, bos_token: str, eos_token: str) -> None:
        self._template, self._tokens = template, (bos_token, eos_token)

    def _render(self, *answers: Message) -> str:
        messages = [{"role": "user", "content": _TEXT}, *answers]
        return render_chat(self._template, messages, *self._tokens, add_generation_prompt=not answers, tools=[_TOOL])

    def format(self, is_described: bool) -> ToolFormat | None:
        """Return the format, None if the template writes calls in another kind of format.

        If functions must be described, also return None if the template ignores them.
        """
        if is_described and _NAMES[0] not in self._render():
            return None
        one, arguments, spaced = self._written(_NAMES[0]), json.dumps(_ARGUMENTS), json.dumps(with_spaces(_ARGUMENTS))
        name = one.find(_NAMES[0])
        has_spaces = not is_described and spaced in one
        arguments = spaced if has_spaces else arguments
        start = one.find(arguments, name)
        if name < 0 or start < 0:
            return None
        begin, middle = one[:name], one[name + len(_NAMES[0]) : start]
        end = one[start + len(arguments) :]
        if not begin.strip() or not middle:
            return None
        between = self._between(begin, middle, arguments, end)
        return ToolFormat(begin, middle, between, end, has_spaced_texts=has_spaces)

    def _written(self, *names: str) -> str:
        """Return the text of an answer with calls of `names`, "" if the template does not write it.

        The position is that of the text in an answer without calls.
        """
        calls = [_call(name) for name in names]
        text = self._render({"role": "assistant", "content": "", "tool_calls": calls})
        plain = self._render({"role": "assistant", "content": _TEXT})
        start = plain.rfind(_TEXT)  # the question has the same text before it
        before, after = plain[:start], plain[start + len(_TEXT) :]
        return text[start:].removesuffix(after) if text.startswith(before) else ""

    def _between(self, begin: str, middle: str, arguments: str, end: str) -> str:
        """Return the text between two calls, "" if the template writes only one."""
        try:
            two = self._written(*_NAMES)
        except EfficientLLMError:
            return ""
        head = begin + _NAMES[0] + middle + arguments
        tail = _NAMES[1] + middle + arguments + end
        if not (two.startswith(head) and two.endswith(tail)):
            return ""
        return two[len(head) : len(two) - len(tail)]
