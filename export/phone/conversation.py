"""Describe conversations for apps that have neither a template engine nor a converter of JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.base.errors import EfficientLLMError, ModelError, UsageError, first_line
from ...runtime.chat_template import texts_around
from ...runtime.engines.scheduler import EngineScheduler
from ...runtime.prompt import ToolUse, tool_prompt
from ...runtime.spaced_texts import schema_with_spaces
from ...runtime.tool_format import MAX_CALLS, parameters_of

Tools = Sequence[Mapping[str, Any]]
"""Functions in OpenAI's form."""


@dataclass(frozen=True)
class TemplateTexts:
    """Text of a chat template: START question (ANSWER answer BETWEEN question)* OPEN.

    With a system message, SYSTEM[0] message SYSTEM[1] replaces START.
    """

    start: str
    open: str
    system: tuple[str, str] | None
    """None if the template takes no system message."""
    answer: str | None
    between: str | None
    """None, as `answer`, if earlier turns are written in another way: every question then stands alone."""


QUESTION, EARLIER, LATER, SYSTEM = "(probe question)", "(probe one)", "(probe two)", "(probe system)"
"""Contents of messages, which no template changes."""


def chat_turns(engine: EngineScheduler, tools: Tools = ()) -> TemplateTexts:
    """Return the turns of a model's chat template, with the description of `tools` in them.

    Without a template, a question is the whole prompt.
    """
    if engine.chat_template is None:
        return TemplateTexts("", "", None, None, None)
    alone = _around(engine, tools, ("user", QUESTION))
    if alone is None:
        raise ModelError("the chat template does not write the question; no kit can use it")
    start, open = alone
    user, one, two = ("user", QUESTION), ("assistant", EARLIER), ("assistant", LATER)
    answer, between = None, None
    match _around(engine, tools, user, one, user, two, user):
        case [begin, *middle, end] if (begin, end) == (start, open) and middle[:2] == middle[2:]:
            answer, between = middle[:2]
    system = None
    match _around(engine, tools, ("system", SYSTEM), user, one, user):
        case [first, second, *rest] if rest == [answer, between, open]:
            system = (first, second)
    return TemplateTexts(start, open, system, answer, between)


def _around(engine: EngineScheduler, tools: Tools, *messages: tuple[str, str]) -> list[str] | None:
    """Return the texts around the messages of a prompt, None if the template refuses them or omits one."""
    shown = [{"role": role, "content": content} for role, content in messages]
    try:
        prompt = tool_prompt(engine, shown, ToolUse(tools) if tools else None)
        return texts_around(prompt.text.removeprefix(engine.bos_token) if engine.adds_bos else prompt.text, shown)
    except EfficientLLMError:
        return None


@dataclass(frozen=True)
class Calls:
    """Format of an answer with calls: BEGIN name MIDDLE arguments (BETWEEN name MIDDLE arguments)* END."""

    begin: str
    middle: str
    between: str
    """Empty if an answer has one call."""
    has_spaced_texts: bool
    """True if texts in arguments begin with a space, which is no part of them."""
    grammar: str
    """Grammar of such an answer in llama.cpp's GBNF."""


def read_functions(path: Path) -> Tools:
    """Return the functions of a JSON file, a list in OpenAI's form. Raises UsageError for another content."""
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
        names = [tool["function"]["name"] for tool in tools]
    except (OSError, ValueError, TypeError, LookupError) as error:
        form = '[{"type": "function", "function": {"name": ..., "parameters": ...}}]'
        raise UsageError(f"--functions {path} is no list of functions, {form}: {first_line(error)}") from error
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"--functions {path}: needs one or more functions with different names")
    return tools


def chat_calls(engine: EngineScheduler, tools: Tools) -> Calls:
    """Return the format in which a model calls `tools`. Raises UsageError if llama.cpp cannot enforce a schema."""
    from llama_cpp.llama_grammar import SchemaConverter

    class Converter(SchemaConverter):
        """Writes quotes in texts correctly (0.3.36 does not), and other letters as models write them."""

        def _format_literal(self, literal: str) -> str:
            return _literal(literal)

        def _generate_constant_rule(self, value: Any) -> str:
            return _literal(json.dumps(value, ensure_ascii=False))

    prompt = tool_prompt(engine, [{"role": "user", "content": QUESTION}], ToolUse(tools))
    format = prompt.format
    converter = Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    calls = []
    for index, tool in enumerate(tools):
        function = tool["function"]
        schema = parameters_of(function)
        if format.has_spaced_texts:
            schema = json.loads(json.dumps(schema_with_spaces(schema)), object_hook=_without_space_pattern)
        try:
            rule = converter.visit(converter.resolve_refs(schema, f"function-{index}"), f"function-{index}")
            converter._rules[rule] = converter._rules[rule].removesuffix(" space")  # the format goes on at once
        except Exception as error:  # it asserts, and raises what it likes
            name = function["name"]
            raise UsageError(
                f"--functions: llama.cpp cannot enforce the schema of {name!r}: {first_line(error)}"
            ) from error
        calls.append(f"{_literal(function['name'] + format.middle)} {rule}")
    # a model that was not trained to call functions may repeat a call without end
    between = format.between if format.is_from_template or format.is_learned else ""
    more = f"({_literal(between)} call){{0,{MAX_CALLS - 1}}} " if between else ""
    begin = "".join(f"<[{token}]> " for token in prompt.control) + _literal(format.begin)
    root = f"root ::= {begin} call {more}{_literal(format.end)}\ncall ::= {' | '.join(calls)}\n"
    # JSON has no control characters in texts, which the converter allows
    grammar = root + converter.format_grammar().replace(r'char ::= [^"\\]', r'char ::= [^"\\\x7F\x00-\x1F]')
    return Calls(format.begin, format.middle, between, format.has_spaced_texts, grammar)


def _without_space_pattern(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without the pattern of spaced texts, which the converter cannot read."""
    return {key: value for key, value in schema.items() if (key, value) != ("pattern", "^ ")}


def _literal(text: str) -> str:
    """Return a literal of GBNF, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)
