"""How a model writes calls of functions: as its chat template does, or as we tell it where the template knows none.

Control tokens of a chat are its template's alone: what looks like one in a message is text, wherever it stands.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .base.errors import EfficientLLMError, UsageError
from .chat_template import Message, render_chat
from .engines.scheduler import EngineScheduler
from .grammar import Grammar, embedded_schema, schema_part

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

    def as_read(self, engine: EngineScheduler) -> tuple[tuple[int, ...], ToolFormat] | None:
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
        text that ends with calls; where `otherwise` is a schema, JSON or calls. UsageError where a schema cannot be
        enforced; it names the tool."""
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
        parts = [schema_part(parameters_of(each), f"tool {each['name']!r}: parameters") for each in functions]
        parts += [schema_part(otherwise, "json_schema")] if otherwise is not None else []
        return Grammar("\n".join(lines) + "\n", "tools", tuple(parts)).checked()

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


def _text(engine: EngineScheduler, tokens: Sequence[int]) -> str:
    return b"".join(map(engine.token_bytes, tokens)).decode("utf-8", "replace")


def _without_control(engine: EngineScheduler, tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if engine.token_bytes(token)]


def _until_control(engine: EngineScheduler, tokens: Sequence[int]) -> list[int]:
    return list(itertools.takewhile(engine.token_bytes, tokens))


def _is_plain(engine: EngineScheduler, text: str) -> bool:
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


SPARE = "".join(filter(str.isprintable, map(chr, range(0x1FB00, 0x1FBCB))))
"""Characters that hardly a text is made of: Unicode's symbols for legacy computing. They have no case and are no
letters, and Python writes them as they are (private characters it escapes, where a template prints a mapping)."""
TAG = r"</?[A-Za-z]\w{0,30}>"
"""What templates look for in messages, such as </think>."""
NOTHING = "(?!)"


class Disguise:
    """Stand-ins for the first characters of control tokens in messages, from the rendering of a template to its tokens.

    A stand-in is one character that occurs nowhere else; a template puts it where it would have put the other. So every
    control token that it writes is its own, whatever it joins, deletes or repeats of the messages.
    """

    def __init__(self, engine: EngineScheduler, *shown: Any) -> None:
        """`shown`: all that a template is given, texts in any nesting of mappings and sequences.

        UsageError where no character is left to stand in.
        """
        self._engine = engine
        self._controls = _Controls.of(engine.control_texts)
        taken = set("".join(_texts(shown)))
        spare = (character for character in SPARE if character not in taken)
        wanted = ["", *sorted(taken & self._controls.firsts)]
        self._stand_ins = dict(zip(wanted, spare, strict=False))
        if len(self._stand_ins) < len(wanted):
            raise UsageError("the messages use up all of Unicode's symbols for legacy computing; leave some out")
        self.end = self._stand_ins.pop("")
        """A character to mark a place with."""
        self._back = str.maketrans({stand_in: first for first, stand_in in self._stand_ins.items()})

    def hide(self, shown: Any) -> Any:
        """`shown` with stand-ins."""
        if not self._stand_ins:
            return shown
        if isinstance(shown, str):
            return self._controls.beginnings.sub(self._stand_in, shown)
        if isinstance(shown, Mapping):
            return {self.hide(key): self.hide(value) for key, value in shown.items()}
        return [self.hide(one) for one in shown] if isinstance(shown, Sequence) else shown

    def _stand_in(self, found: re.Match[str]) -> str:
        text = found[0]
        is_tag = len(text) > 1 and text not in self._controls.texts
        return text if is_tag or text[0] not in self._stand_ins else self._stand_ins[text[0]] + text[1:]

    def encode(self, rendered: str) -> list[int]:
        """Token ids of what the template made: its own control tokens, and text between them."""
        text = rendered.translate(self._back)
        if self._controls.places(text) == self._controls.places(rendered):  # no message spells one
            return self._tokens(text, special=True)
        tokens: list[int] = []
        as_it_is = ""
        for piece in self._controls.split(rendered):
            if (said := piece.translate(self._back)) == piece:
                as_it_is += piece
            else:
                tokens += self._tokens(as_it_is, special=True) + self._tokens(said, special=False)
                as_it_is = ""
        return tokens + self._tokens(as_it_is, special=True)

    def _tokens(self, text: str, special: bool) -> list[int]:
        return self._engine.tokenize(text, special) if text else []


class _Controls:
    """A vocabulary's control tokens in texts."""

    def __init__(self, texts: frozenset[str]) -> None:
        self.texts = texts
        self.firsts = {text[0] for text in texts}
        firsts = f"[{''.join(map(re.escape, sorted(self.firsts)))}]" if texts else NOTHING
        self.beginnings = re.compile(f"{TAG}|{firsts}")
        """Where one may begin: a tag, or a first character."""
        self._all = re.compile(f"({_any_of(sorted(texts)) if texts else NOTHING})")

    @staticmethod
    @lru_cache(maxsize=8)
    def of(texts: frozenset[str]) -> _Controls:
        """Made once for an engine: there may be thousands."""
        return _Controls(texts)

    def places(self, text: str) -> list[int]:
        """Where they stand in a text."""
        return [found.start() for found in self._all.finditer(text)]

    def split(self, text: str) -> list[str]:
        """Control tokens and what stands between them."""
        return self._all.split(text)


def _any_of(texts: Sequence[str], start: int = 0) -> str:
    """A pattern of sorted texts, the longest first, without groups: their common beginnings are read once, so that a
    text is searched in the time of its length."""
    branches: dict[str, list[str]] = {}
    for text in texts:
        if len(text) > start:
            branches.setdefault(text[start], []).append(text)
    is_end = len(texts[0]) == start
    if not branches:
        return ""
    each = [re.escape(first) + _any_of(begun, start + 1) for first, begun in branches.items()]
    joined = each[0] if len(each) == 1 and not is_end else f"(?:{'|'.join(each)})"
    return joined + "?" if is_end else joined


def _texts(shown: Any) -> Iterator[str]:
    if isinstance(shown, str):
        yield shown
    elif isinstance(shown, Mapping):
        yield from _texts(list(shown))
        yield from _texts(list(shown.values()))
    elif isinstance(shown, Sequence):
        for one in shown:
            yield from _texts(one)
