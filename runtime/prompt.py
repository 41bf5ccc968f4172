"""From a conversation or a text to the tokens that an answer follows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .base.errors import UsageError
from .call_reader import CallReader
from .chat_template import Message, render_chat
from .engines.scheduler import EngineScheduler
from .grammar import GrammarConstraint
from .tool_format import GENERIC, INSTRUCTIONS, Disguise, ToolFormat, tool_format

ToolChoice = Literal["auto", "required"]


@dataclass(frozen=True)
class ToolUse:
    """Functions that an answer may call."""

    tools: Sequence[Mapping[str, Any]]
    """OpenAI's: {"type": "function", "function": {"name", "description", "parameters"}}."""
    must_call: bool = False
    """Whether the answer has to be a call."""
    only: str = ""
    """The one function that it may call; the model is shown all of them."""
    parallel: bool = True
    """Whether an answer may call more than once."""
    otherwise: Mapping[str, Any] | None = None
    """JSON schema of an answer that calls nothing; None: any text."""


@dataclass(frozen=True)
class ChatPrompt:
    """The tokens of a conversation, and what its answer is like."""

    tokens: list[int]
    tool_use: ToolUse | None = None
    format: ToolFormat = GENERIC
    control: tuple[int, ...] = ()
    """Control tokens that a call begins with, which are no text."""

    def constraint(self, engine: EngineScheduler) -> GrammarConstraint | None:
        """What keeps an answer's calls valid; None where there is nothing to call."""
        use = self.tool_use
        if use is None:
            return None
        tools = [tool for tool in use.tools if use.only in ("", tool["function"]["name"])]
        grammar = self.format.grammar(
            tools, self.control, must_call=use.must_call or bool(use.only), otherwise=use.otherwise
        )
        return GrammarConstraint(engine, grammar, self.control)

    def reader(self) -> CallReader | None:
        """What tells calls from text in an answer."""
        return CallReader(self.format) if self.tool_use is not None else None


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation is shown to the model."""

    tool_use: ToolUse | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as enable_thinking."""


def chat_prompt(engine: EngineScheduler, messages: Sequence[Message], options: ChatOptions | None = None) -> list[int]:
    """Token ids of a chat, ready for the assistant's answer."""
    return tool_prompt(engine, messages, options).tokens


def tool_prompt(engine: EngineScheduler, messages: Sequence[Message], options: ChatOptions | None = None) -> ChatPrompt:
    """A chat, ready for the assistant's answer, which goes on with the last message where that is the assistant's.

    UsageError where the model's template refuses the messages; ArtefactError where it has none.
    """
    options = options or ChatOptions()
    if not messages:
        raise UsageError("there are no messages")
    use, format, control = options.tool_use, GENERIC, ()
    shown: Sequence[Mapping[str, Any]] = use.tools if use else ()
    if use or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        found = tool_format(engine.chat_template, engine.bos_token, engine.eos_token).as_read(engine)
        control, format = found or ((), GENERIC)
        if not format.is_template_s:
            messages, shown = _in_plain_roles(messages, shown), ()
        # a model that was not trained to call does not know when it has called enough
        is_single = use is not None and (use.only or not use.parallel or (use.must_call and not format.is_template_s))
        format = replace(format, between="") if is_single else format
    disguise = Disguise(engine, messages, shown, options.variables)
    text = _render(engine, disguise, messages, tools=shown, variables=options.variables)
    tokens = disguise.encode(text)
    if engine.adds_bos and not text.startswith(engine.bos_token):
        tokens = engine.tokenize(engine.bos_token, special=True) + tokens
    return ChatPrompt(tokens, use, format, control)


def text_prompt(engine: EngineScheduler, text: str) -> list[int]:
    """Token ids of a text that is to go on; what looks like a control token is text. [] where there is nothing."""
    tokens = engine.tokenize(text, special=False)
    # a model that knows no BOS by habit still needs one token to begin with
    begins = engine.tokenize(engine.bos_token, special=True) if engine.adds_bos or not tokens else []
    return begins + tokens


def _in_plain_roles(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows no functions: they are told of, called and answered in plain text."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content") or ""
        if message["role"] == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if plain and plain[-1].get("is_result"):  # answers of one turn are one message
                plain[-1]["content"] += f"\n{content}"
            else:
                plain.append({"role": "user", "content": content, "is_result": True})
        else:
            if calls := message.get("tool_calls"):
                content = f"{content}\n{GENERIC.write(calls)}".strip()
            plain.append({"role": message["role"], "content": content})
    if tools:
        listed = "\n".join(_json(tool["function"]) for tool in tools)
        instructions = INSTRUCTIONS.format(tools=listed)
        if plain[0]["role"] == "system":
            plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{instructions}"}
        else:
            plain.insert(0, {"role": "system", "content": instructions})
    return [{"role": message["role"], "content": message["content"]} for message in plain]


def _render(engine: EngineScheduler, disguise: Disguise, messages: Sequence[Message], **how: Any) -> str:
    """The template's text, up to where the answer goes on, with what `disguise` hides."""
    messages, how = disguise.hide(messages), {name: disguise.hide(value) for name, value in how.items()}
    *earlier, last = messages
    if last["role"] != "assistant" or last.get("tool_calls"):
        return _rendered_somehow(engine, messages, {**how, "add_generation_prompt": True})
    marked = [*earlier, {**last, "content": (last.get("content") or "") + disguise.end}]
    text, mark, _ = _rendered_somehow(engine, marked, {**how, "add_generation_prompt": False}).rpartition(disguise.end)
    if not mark:
        raise UsageError("the model's chat template does not show the assistant's last message; ask with a user's")
    return text


def _rendered_somehow(engine: EngineScheduler, messages: Sequence[Message], how: Mapping[str, Any]) -> str:
    """As the template has it; one that refuses several system messages, or any, gets one, or its text in the first
    question."""
    refusal: UsageError | None = None
    for arrange in (list, _one_system_message, _no_system_message):
        arranged = arrange(messages)
        if refusal is not None and arranged == list(messages):
            continue
        try:
            return render_chat(engine.chat_template, arranged, engine.bos_token, engine.eos_token, **how)
        except UsageError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _one_system_message(messages: Sequence[Message]) -> list[Message]:
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": system}, *others] if system else list(messages)


def _no_system_message(messages: Sequence[Message]) -> list[Message]:
    arranged = _one_system_message(messages)
    if len(arranged) < 2 or [message["role"] for message in arranged[:2]] != ["system", "user"]:
        return arranged
    system, question, *others = arranged
    return [{**question, "content": f"{system['content']}\n\n{question['content']}"}, *others]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
