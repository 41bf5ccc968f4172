"""Render chat templates in a sandbox, and escape control tokens in messages.

Templates come with models and are not trusted. Only a template may write control tokens: text in a message that looks
like one stays text.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .base.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from .engines.scheduler import EngineScheduler

PLACEHOLDERS = "".join(filter(str.isprintable, map(chr, range(0x1FB00, 0x1FBCB))))
"""Characters that are rare in text: Unicode's symbols for legacy computing.

They are not letters and have no case. Python prints them unchanged in a mapping, unlike private characters.
"""
JSON_PLACEHOLDER = re.compile(r"\\ud83e\\udf[0-9a-c][0-9a-f]")
"""A placeholder in JSON that is restricted to ASCII."""
TAG = r"</?[A-Za-z]\w{0,30}>"
"""Tags such as </think>, which templates search for in messages."""
NOTHING = "(?!)"
"""Pattern that matches nothing."""

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; an assistant's may have "tool_calls"
[{"type": "function", "function": {"name": name, "arguments": {...}}}], a tool's has "name" and "tool_call_id"."""


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    """Return JSON as the filter of transformers does, with placeholders unchanged."""
    text = json.dumps(value, **{"ensure_ascii": False, **options})
    if options.get("ensure_ascii"):
        text = JSON_PLACEHOLDER.sub(lambda found: json.loads(f'"{found[0]}"'), text)
    return text


class _GenerationTag(Extension):
    """The tag {% generation %} of transformers, which marks text to train on. Only the text is rendered here."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, without its checks for the safe attributes of texts and namespaces.

    They took most of the time of a template that reads a long list.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)  # isinstance would ask a namespace for its attribute __class__
        if (kind is str and attribute in _TEXT_METHODS) or (kind is Namespace and attribute[:1] != "_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                pass
        return super().getattr(obj, attribute)


_TEXT_METHODS = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=16)
def names_in(template: str) -> frozenset[str]:
    """Return the variables, attributes and constant texts of a template, none if it is malformed."""
    try:
        tree = _environment().parse(template)
    except jinja2.TemplateSyntaxError:
        return frozenset()
    found = {name.name for name in tree.find_all(nodes.Name)} | {each.attr for each in tree.find_all(nodes.Getattr)}
    texts = (each.value for each in tree.find_all(nodes.Const))
    return frozenset(found.union(each for each in texts if isinstance(each, str)))


def read_template_file(path: str) -> str:
    """Return the chat template in the file of --chat-template. Raises UsageError unless it renders a question."""
    try:
        template = Path(path).read_text(encoding="utf-8")
        if not template.strip():
            raise UsageError("the file is empty")
        render_chat(template, [{"role": "user", "content": "Hello"}])
    except (OSError, UnicodeDecodeError, ArtefactError, UsageError) as error:
        reason = getattr(error, "strerror", None) or str(error).replace("the model's chat template", "the template")
        raise UsageError(f"--chat-template {path}: {reason}; give a Jinja file that writes a conversation") from error
    return template


def described(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return functions in OpenAI's form as templates get them: without empty fields, and without `strict`."""
    fields = ("name", "description", "parameters")
    functions = [{name: tool["function"][name] for name in fields if tool["function"].get(name)} for tool in tools]
    return [{"type": "function", "function": function} for function in functions]


def render_chat(
    template: str | None,
    messages: Sequence[Message],
    bos_token: str = "",
    eos_token: str = "",
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the prompt for the next answer to `messages`, as transformers' apply_chat_template does.

    Without a generation prompt it is the conversation only. `tools` have OpenAI's form. `variables` are further
    variables of the template, such as enable_thinking.

    Raises ArtefactError without a template or if it fails, and UsageError if it refuses the messages.
    """
    if template is None:
        raise ArtefactError("the model has no chat template; use plain completion")
    values: dict[str, Any] = {
        **(variables or {}),
        "tools": described(tools) or None,
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    try:
        return _compile(template).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise ArtefactError(f"the model's chat template is malformed: {error}") from error
    except jinja2.TemplateError as error:
        raise UsageError(f"the model's chat template refuses these messages: {error}") from error
    except Exception as error:  # a template is a program that may raise anything
        reason = f"{type(error).__name__} {error}"
        raise ArtefactError(f"the model's chat template fails on these messages: {reason}") from error


def texts_around(rendered: str, messages: Sequence[Message]) -> list[str]:
    """Return the texts before, between and after the contents of `messages` in a rendered chat.

    Raises ArtefactError if the template omits a message or writes another order.
    """
    texts = []
    for message in messages:
        before, found, rendered = rendered.partition(message["content"])
        if not found:
            raise ArtefactError("the model's chat template omits a message")
        texts.append(before)
    return [*texts, rendered]


class MessageEscape:
    """Replaces the first characters of control tokens in messages while a template is rendered.

    A placeholder is one character that occurs in no message, and a template copies it like the character it replaces.
    All control tokens in the rendered text are therefore the template's own, also if it joins or repeats messages.
    """

    def __init__(self, engine: EngineScheduler, *inputs: Any) -> None:
        """Choose placeholders for `inputs`, the template's variables: texts in nested mappings and sequences.

        Raises UsageError if the texts use up all placeholders.
        """
        self._engine = engine
        self._controls = _ControlTokens.of(engine.control_texts)
        used = set("".join(_texts(inputs)))
        free = (character for character in PLACEHOLDERS if character not in used)
        needed = ["", *sorted(used & self._controls.firsts)]
        self._placeholders = dict(zip(needed, free, strict=False))
        if len(self._placeholders) < len(needed):
            raise UsageError("the messages use up all of Unicode's symbols for legacy computing; leave some out")
        self.end_mark = self._placeholders.pop("")
        """A character that marks a position in the rendered text."""
        self._originals = str.maketrans({placeholder: first for first, placeholder in self._placeholders.items()})

    def apply(self, value: Any) -> Any:
        """Return `value` with placeholders in all of its texts."""
        if not self._placeholders:
            return value
        if isinstance(value, str):
            return self._controls.beginnings.sub(self._replace, value)
        if isinstance(value, Mapping):
            return {self.apply(key): self.apply(each) for key, each in value.items()}
        return [self.apply(each) for each in value] if isinstance(value, Sequence) else value

    def _replace(self, found: re.Match[str]) -> str:
        text = found[0]
        # a tag that is no control token stays readable for the template
        is_tag = len(text) > 1 and text not in self._controls.texts
        if is_tag or text[0] not in self._placeholders:
            return text
        return self._placeholders[text[0]] + text[1:]

    def restore(self, rendered: str) -> str:
        """Return a rendered template with the original characters."""
        return rendered.translate(self._originals)

    def encode(self, rendered: str) -> list[int]:
        """Return the token ids of a rendered template: its control tokens, and the text between them."""
        text = self.restore(rendered)
        if self._controls.positions(text) == self._controls.positions(rendered):  # no message has control tokens
            return self._tokenize(text, special=True)
        # Pieces without placeholders are joined and tokenized in one call: a cut may change the tokens beside it.
        tokens: list[int] = []
        pending = ""
        for piece in self._controls.split(rendered):
            if (original := piece.translate(self._originals)) == piece:
                pending += piece
            else:
                tokens += self._tokenize(pending, special=True) + self._tokenize(original, special=False)
                pending = ""
        return tokens + self._tokenize(pending, special=True)

    def _tokenize(self, text: str, special: bool) -> list[int]:
        return self._engine.tokenize(text, special) if text else []


class _ControlTokens:
    """Finds the control tokens of a vocabulary in texts."""

    def __init__(self, texts: frozenset[str]) -> None:
        self.texts = texts
        self.firsts = {text[0] for text in texts}
        firsts = f"[{''.join(map(re.escape, sorted(self.firsts)))}]" if texts else NOTHING
        self.beginnings = re.compile(f"{TAG}|{firsts}")
        """A tag, or the first character of a control token."""
        self._all = re.compile(f"({_any_of(sorted(texts)) if texts else NOTHING})")

    @staticmethod
    @lru_cache(maxsize=8)
    def of(texts: frozenset[str]) -> _ControlTokens:
        """Return the cached object for `texts`, which may be thousands."""
        return _ControlTokens(texts)

    def positions(self, text: str) -> list[int]:
        """Return the start of every control token in `text`."""
        return [found.start() for found in self._all.finditer(text)]

    def split(self, text: str) -> list[str]:
        """Return the control tokens of `text` and the texts between them."""
        return self._all.split(text)


def _any_of(texts: Sequence[str], start: int = 0) -> str:
    """Return a pattern without groups for sorted `texts`, longest match first, from character `start`."""
    # common beginnings are matched once, so that a search takes time linear in the text
    branches: dict[str, list[str]] = {}
    for text in texts:
        if len(text) > start:
            branches.setdefault(text[start], []).append(text)
    is_end = len(texts[0]) == start
    if not branches:
        return ""
    patterns = [re.escape(first) + _any_of(others, start + 1) for first, others in branches.items()]
    joined = patterns[0] if len(patterns) == 1 and not is_end else f"(?:{'|'.join(patterns)})"
    return joined + "?" if is_end else joined


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in nested mappings and sequences, in no order."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            pending += value.keys()
            pending += value.values()
        elif isinstance(value, Sequence):
            pending += value
