"""Rendering a tokenizer's chat template, sandboxed: templates come with models and are not to be trusted."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .base.errors import ArtefactError, UsageError

STAND_IN = re.compile(r"\\ud83e\\udf[0-9a-c][0-9a-f]")
"""One of `markers.SPARE` in ASCII's JSON."""

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; an assistant's may have "tool_calls"
[{"type": "function", "function": {"name": name, "arguments": {...}}}], a tool's has "name" and "tool_call_id"."""


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    """transformers' filter; characters that stand for others (`markers`) stay as they are."""
    text = json.dumps(value, **{"ensure_ascii": False, **options})
    return STAND_IN.sub(lambda found: json.loads(f'"{found[0]}"'), text) if options.get("ensure_ascii") else text


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %}: tells transformers what to train on; here only the text counts."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(template)


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
    """The prompt for the next answer to `messages`, as transformers' apply_chat_template would build it.

    Without a generation prompt: the conversation as it stands. `tools` are OpenAI's; `variables` are what else the
    template knows, such as enable_thinking.

    ArtefactError where the model has no template or one that fails, UsageError where the template refuses the messages.
    """
    if template is None:
        raise ArtefactError("the model has no chat template; use plain completion")
    values: dict[str, Any] = {
        **(variables or {}),
        "tools": list(tools) or None,
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
    except Exception as error:  # a template computes what it likes
        reason = f"{type(error).__name__} {error}"
        raise ArtefactError(f"the model's chat template fails on these messages: {reason}") from error
