"""Convert a conversation or a text into the tokens of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from .base.errors import UsageError
from .call_reader import BEGIN_REASONING, END_REASONING, CallReader, ReasoningReader
from .chat_template import Message, MessageEscape, described, render_chat
from .copied_arguments import CopiedArguments, ToolArguments, words_rule
from .engines.scheduler import EngineScheduler
from .grammar import CACHED_GRAMMARS, Grammar, GrammarConstraint
from .listed_context import Record, listed_records
from .tool_format import GENERIC, INSTRUCTIONS, ToolFormat, tool_format


@dataclass(frozen=True)
class ToolUse:
    """Functions that an answer may call, and how."""

    tools: Sequence[Mapping[str, Any]]
    """Functions in OpenAI's form, {"type": "function", "function": {"name", "description", "parameters", "strict"}}.
    Keywords that cannot be enforced are ignored unless a function is strict."""
    must_call: bool = False
    """True if the answer must be a call."""
    only: str = ""
    """Name of the only function that may be called. The model sees all of them."""
    parallel: bool = True
    """True if an answer may have several calls."""
    otherwise: Mapping[str, Any] | None = None
    """JSON schema of an answer without calls. None: any text."""
    arguments: ToolArguments = "any"
    """Free texts in arguments, see ToolArguments."""


@dataclass(frozen=True)
class ChatPrompt:
    """Tokens of a conversation, and the format of calls in its answer."""

    tokens: list[int]
    tool_use: ToolUse | None = None
    format: ToolFormat = GENERIC
    control: tuple[int, ...] = ()
    """Control tokens at the start of a call, which have no text."""
    texts: Sequence[str] = ()
    """Messages of user and tools, from which arguments are copied."""
    records: Sequence[Record] | None = None
    """Records that the conversation lists, None if the template does not say how."""
    reasoning: Literal["none", "possible", "begun"] = "none"
    """True if the answer may begin with reasoning, or the prompt ends with its mark."""
    text: str = ""
    """The rendered template. Text in messages that looks like a control token cannot be told from one here."""

    def constraint(self, engine: EngineScheduler) -> GrammarConstraint | None:
        """Return the constraint that keeps calls valid, None without functions."""
        use = self.tool_use
        if use is None:
            return None
        records = self.records if use.arguments == "listed" else ()
        if records is None:
            raise UsageError(
                "tool_arguments listed: the chat template does not say how its context lists values; use copy"
            )
        texts = self.texts if use.arguments == "examples" else ()
        grammar = _grammar(_Calls(repr((use, records, texts)), use, records, texts), self.format, self.control)
        if use.arguments != "any":
            grammar = replace(grammar, source=grammar.source + words_rule(self.texts)).bounded()
        return GrammarConstraint(engine, grammar, self.control)

    def reader(self, is_free: bool = True) -> CallReader | ReasoningReader | None:
        """Return the reader that separates reasoning and calls from text, None if an answer can have neither.

        An answer that is not `is_free` follows a response format and has no reasoning.
        """
        use = self.tool_use
        calls = CallReader(self.format, use.must_call) if use is not None else None
        must_call = use is not None and (use.must_call or use.only or use.otherwise is not None)
        if self.reasoning == "none" or not is_free or must_call:
            return calls
        return ReasoningReader(self.reasoning == "begun", calls)


@dataclass(frozen=True)
class _Calls:
    """Functions and the values of their arguments, compared by their text."""

    text: str
    use: ToolUse = field(compare=False)
    records: Sequence[Record] = field(compare=False)
    examined: Sequence[str] = field(compare=False)
    """Texts in which the examples are looked for."""


@lru_cache(maxsize=CACHED_GRAMMARS)
def _grammar(calls: _Calls, format: ToolFormat, control: tuple[int, ...]) -> Grammar:
    """Return the grammar of an answer with calls. The rule of the words that arguments may copy is missing."""
    use, copied = calls.use, None
    if use.arguments != "any":
        copied = CopiedArguments(
            calls.examined,
            are_spaced=format.has_spaced_texts,
            only_examples=use.arguments == "examples",
            records=calls.records,
        )
    tools = [tool for tool in use.tools if use.only in ("", tool["function"]["name"])]
    must_call = use.must_call or bool(use.only)
    return format.grammar(tools, control, must_call=must_call, otherwise=use.otherwise, copied=copied)


def chat_prompt(engine: EngineScheduler, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a chat up to the assistant's answer."""
    return tool_prompt(engine, messages).tokens


def tool_prompt(
    engine: EngineScheduler,
    messages: Sequence[Message],
    use: ToolUse | None = None,
    variables: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """Return the prompt of a chat. The answer continues the last message if that is the assistant's.

    `variables` are further variables of the chat template, such as enable_thinking. Raises UsageError if the template
    refuses the messages, and ArtefactError without a template.
    """
    if not messages:
        raise UsageError("there are no messages")
    format, control = GENERIC, ()
    shown: Sequence[Mapping[str, Any]] = use.tools if use else ()
    texts = [message.get("content") or "" for message in messages if message["role"] in ("user", "tool")]
    contents = (message.get("content") or "" for message in messages if message["role"] != "assistant")
    records = listed_records(engine.chat_template, contents) if use and use.arguments == "listed" else None
    has_calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if use or has_calls:
        found = tool_format(engine.chat_template, engine.bos_token, engine.eos_token).readable_by(engine)
        control, format = found or ((), GENERIC)
        if not format.is_from_template:
            messages, shown = in_plain_roles(messages, shown, format)
        # a model that was not trained to call functions may repeat a call without end
        is_untrained = use is not None and use.must_call and not format.is_from_template
        # without a text between calls, the grammar ends after the first one
        if use is not None and (use.only or not use.parallel or is_untrained):
            format = replace(format, between="")
    escape = MessageEscape(engine, messages, shown, variables)
    text = _render(engine, escape, messages, tools=shown, variables=variables)
    tokens = escape.encode(text)
    if engine.adds_bos and not text.startswith(engine.bos_token):
        tokens = engine.tokenize(engine.bos_token, special=True) + tokens
    reasoning = _reasoning(engine, messages[-1], text)
    return ChatPrompt(tokens, use, format, control, texts, records, reasoning, escape.restore(text))


def _reasoning(engine: EngineScheduler, last: Message, text: str) -> Literal["none", "possible", "begun"]:
    """Return whether the answer to `last` may begin with reasoning. `text` is the rendered prompt."""
    if END_REASONING not in (engine.chat_template or ""):
        return "none"
    if last["role"] == "assistant":  # the answer continues it
        content = last.get("content") or ""
        is_open = content.rfind(BEGIN_REASONING) > content.rfind(END_REASONING)
        return "begun" if is_open else "none"
    return "begun" if text.rstrip().endswith(BEGIN_REASONING) else "possible"


def text_prompt(engine: EngineScheduler, text: str, special: bool = False) -> list[int]:
    """Return the token ids of a text to continue, [] if it is empty. Control tokens in it are plain text.

    With `special` they are control tokens, and BOS is not added to a text that begins with it.
    """
    tokens = engine.tokenize(text, special)
    has_bos = special and bool(engine.bos_token) and text.startswith(engine.bos_token)
    # a model that usually has no BOS token still needs one token of input
    begins = (engine.adds_bos and not has_bos) or not tokens
    return (engine.tokenize(engine.bos_token, special=True) if begins else []) + tokens


def in_job(messages: Sequence[Message], job: str) -> list[Message]:
    """Return messages whose system message begins with the name of a job, as training has it. "": as they are."""
    if not job:
        return [*messages]
    has_system = bool(messages) and messages[0]["role"] == "system"
    content = messages[0]["content"] if has_system else ""
    said = f"{job}\n{content}" if content else job
    return [{"role": "system", "content": said}, *messages[has_system:]]


def in_plain_roles(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], format: ToolFormat
) -> tuple[list[dict[str, Any]], Sequence[Mapping[str, Any]]]:
    """Return messages and tools for a template without functions: descriptions, calls and results become plain text.

    A model that was trained on its functions gets no descriptions. Its template gets as they are what it names.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        content, role = message.get("content") or "", message["role"]
        if role == "tool" and "tool" not in format.given:
            content = f"<tool_response>\n{content}\n</tool_response>"
            if plain and plain[-1].get("is_result"):  # results of one turn are one message
                plain[-1]["content"] += f"\n{content}"
            else:
                plain.append({"role": "user", "content": content, "is_result": True})
            continue
        calls = message.get("tool_calls")
        if calls and not format.writes_calls:
            content = f"{content}\n{format.write(calls)}".strip()
        plain.append({"role": role, "content": content})
        if calls and "tool_calls" in format.given:  # without ids, which training does not have
            plain[-1]["tool_calls"] = [{"type": "function", "function": call["function"]} for call in calls]
    if tools and not format.is_learned:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in described(tools))
        instructions = INSTRUCTIONS.format(tools=listed)
        if plain[0]["role"] == "system":
            plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{instructions}"}
        else:
            plain.insert(0, {"role": "system", "content": instructions})
    for each in plain:
        each.pop("is_result", None)
    return plain, tools if "tools" in format.given else ()


def _render(engine: EngineScheduler, escape: MessageEscape, messages: Sequence[Message], **options: Any) -> str:
    """Return the rendered template up to the start of the answer, with the messages escaped."""
    messages = escape.apply(messages)
    options = {name: escape.apply(value) for name, value in options.items()}
    *earlier, last = messages
    if last["role"] != "assistant" or last.get("tool_calls"):
        return _render_with_fallbacks(engine, messages, add_generation_prompt=True, **options)
    marked = {**last, "content": (last.get("content") or "") + escape.end_mark}
    text = _render_with_fallbacks(engine, [*earlier, marked], add_generation_prompt=False, **options)
    text, mark, _ = text.rpartition(escape.end_mark)
    if not mark:
        raise UsageError("the model's chat template does not show the assistant's last message; end with a user's")
    return text


def _render_with_fallbacks(engine: EngineScheduler, messages: Sequence[Message], **options: Any) -> str:
    """Return the rendered template.

    If the template refuses the system messages, they become one, or their text goes to the start of the first question.
    """
    refusal: UsageError | None = None
    for arrange in (list, _one_system_message, _no_system_message):
        arranged = arrange(messages)
        if refusal is not None and arranged == list(messages):
            continue
        try:
            return render_chat(engine.chat_template, arranged, engine.bos_token, engine.eos_token, **options)
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
