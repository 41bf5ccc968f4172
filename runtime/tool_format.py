"""How a model writes calls of functions: as its chat template does, or as we tell it where the template knows none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .base.errors import EfficientLLMError
from .chat_template import Message, render_chat
from .engines.owned import OwnedEngine
from .grammar import Grammar, embedded_schema

MAX_CALLS = 16
"""In one answer: a small model that may go on calling does."""

INSTRUCTIONS = """You can call functions. They are, one JSON object a line:
{tools}
To call one, answer with its name and arguments and nothing else:
<tool_call>
{{"name": "function name", "arguments": {{"parameter": "value"}}}}
</tool_call>"""
"""For models whose template has no place for functions; the form is that of Hermes and Qwen."""


@dataclass(frozen=True)
class ToolFormat:
    """Calls are written BEGIN name MIDDLE arguments (BETWEEN name MIDDLE arguments)* END; arguments are an object."""

    begin: str
    middle: str
    between: str
    """"" where there can only be one call."""
    end: str
    is_template_s: bool = True
    """Whether the chat template shows the functions to the model, writes earlier calls and knows the role tool."""

    def as_read(self, engine: OwnedEngine) -> tuple[tuple[int, ...], ToolFormat] | None:
        """The control tokens that calls begin with, and the format as it reads without them, which is how an answer's
        text comes; None where no text is left to tell a call by."""
        tokens = engine.tokenize(self.begin, special=True)
        num_control = len(tokens) - len(_without_control(engine, tokens))
        begin = _text(engine, tokens)
        is_readable = begin.strip() and self.begin.endswith(begin) and _is_plain(engine, self.middle)
        if not is_readable or any(engine.token_bytes(token) for token in tokens[:num_control]):
            return None
        between = self.between if _is_plain(engine, self.between) else ""
        end = _text(engine, _until_control(engine, engine.tokenize(self.end, special=True)))
        return tuple(tokens[:num_control]), ToolFormat(begin, self.middle, between, end, self.is_template_s)

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        control: Sequence[int],
        *,
        must_call: bool,
        otherwise: Mapping[str, Any] | None = None,
    ) -> Grammar:
        """Calls of `tools` (OpenAI's) with arguments that their parameters allow. Unless they must, answers are text or
        text that ends with calls; where `otherwise` is a schema, JSON or calls."""
        calls = "{0,%d}" % (MAX_CALLS - 1)  # noqa: UP031  braces
        rules = [f"(BETWEEN call){calls}" if self.between else "", "END" if self.end else ""]
        functions = [tool["function"] for tool in tools]
        alternatives = " | ".join(f"call_{index}" for index in range(len(functions)))
        first = "".join(f"<[{token}]> " for token in control) + json.dumps(self.begin)
        has_text = not must_call and otherwise is None
        # lazily: the text ends where the first call begins
        head = f"head: {first}" if not has_text else f"head: TEXT {first}" if control else f"head[lazy]: TEXT {first}"
        lines = [
            "%llguidance {}",
            "start: calls" if must_call else "start: TEXT | calls" if has_text else "start: object | calls",
            f"calls: head call {' '.join(filter(None, rules))}",
            head,
            f"call: {alternatives}",
            *([r"TEXT: /(.|\n)*/"] if has_text else []),
            *([f"object: {embedded_schema(otherwise)}"] if otherwise is not None else []),
            *([f"BETWEEN: {json.dumps(self.between)}"] if self.between else []),
            *([f"END: {json.dumps(self.end)}"] if self.end else []),
        ]
        for index, function in enumerate(functions):
            opening = json.dumps(function["name"] + self.middle)
            lines.append(f"call_{index}: {opening} {embedded_schema(parameters_of(function))}")
        return Grammar("\n".join(lines) + "\n", "tools").checked()

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Earlier calls as the model would have written them."""
        parts = [
            f"{call['function']['name']}{self.middle}{json.dumps(call['function']['arguments'], ensure_ascii=False)}"
            for call in calls
        ]
        return self.begin + self.between.join(parts) + self.end


GENERIC = ToolFormat(
    '<tool_call>\n{"name": "',
    '", "arguments": ',
    '}\n</tool_call>\n<tool_call>\n{"name": "',
    "}\n</tool_call>",
    is_template_s=False,
)
"""The form that most open models were trained on."""


def parameters_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of a function's arguments, always an object; one without parameters takes none."""
    nothing = {"properties": {}, "additionalProperties": False}
    return {**(function.get("parameters") or nothing), "type": "object"}


def _text(engine: OwnedEngine, tokens: Sequence[int]) -> str:
    return b"".join(map(engine.token_bytes, tokens)).decode("utf-8", "replace")


def _without_control(engine: OwnedEngine, tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if engine.token_bytes(token)]


def _until_control(engine: OwnedEngine, tokens: Sequence[int]) -> list[int]:
    return list(itertools.takewhile(engine.token_bytes, tokens))


def _is_plain(engine: OwnedEngine, text: str) -> bool:
    """Whether no control token is in `text`."""
    return all(map(engine.token_bytes, engine.tokenize(text, special=True)))


@lru_cache(maxsize=16)
def tool_format(template: str | None, bos_token: str, eos_token: str) -> ToolFormat:
    """The form that a chat template writes calls in, found by letting it write some; GENERIC where it writes none."""
    try:
        found = _Probe(template, bos_token, eos_token).format()
    except EfficientLLMError:  # it refuses the very messages, so it knows no calls
        found = None
    return found or GENERIC


_NAMES = ("first_probe", "second_probe")
_ARGUMENTS = {"probe_argument": "probe_value"}
_SAID = "What the probe says."
_PARAMETERS = {
    "type": "object",
    "properties": {"probe_argument": {"type": "string", "description": "A text."}},
    "required": ["probe_argument"],
}
_TOOL = {"type": "function", "function": {"name": _NAMES[0], "description": "A probe.", "parameters": _PARAMETERS}}


def _call(name: str) -> dict[str, Any]:
    return {"id": "call00000", "type": "function", "function": {"name": name, "arguments": dict(_ARGUMENTS)}}


class _Probe:
    """A template that is made to write calls."""

    def __init__(self, template: str | None, bos_token: str, eos_token: str) -> None:
        self._template, self._tokens = template, (bos_token, eos_token)

    def _render(self, *answers: Message) -> str:
        messages = [{"role": "user", "content": _SAID}, *answers]
        return render_chat(self._template, messages, *self._tokens, add_generation_prompt=not answers, tools=[_TOOL])

    def format(self) -> ToolFormat | None:
        """None where the template shows no functions, or writes calls in a way that has no such form."""
        if _NAMES[0] not in self._render():
            return None
        one, arguments = self._written(_NAMES[0]), json.dumps(_ARGUMENTS)
        name = one.find(_NAMES[0])
        start = one.find(arguments, name)
        if name < 0 or start < 0:
            return None
        begin, middle = one[:name], one[name + len(_NAMES[0]) : start]
        end = one[start + len(arguments) :]
        if not begin.strip() or not middle:
            return None
        return ToolFormat(begin, middle, self._between(begin, middle, arguments, end), end)

    def _written(self, *names: str) -> str:
        """What an answer is that is calls: what stands where another one has its text; "" where nothing does."""
        calls = [_call(name) for name in names]
        text = self._render({"role": "assistant", "content": "", "tool_calls": calls})
        plain = self._render({"role": "assistant", "content": _SAID})
        start = plain.rfind(_SAID)
        return text[start:].removesuffix(plain[start + len(_SAID) :]) if text.startswith(plain[:start]) else ""

    def _between(self, begin: str, middle: str, arguments: str, end: str) -> str:
        """What stands between two calls; "" where the template writes only one."""
        try:
            two = self._written(*_NAMES)
        except EfficientLLMError:
            return ""
        head = begin + _NAMES[0] + middle + arguments
        tail = _NAMES[1] + middle + arguments + end
        return two[len(head) : len(two) - len(tail)] if two.startswith(head) and two.endswith(tail) else ""
