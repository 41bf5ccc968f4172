"""Documents, chats, and their token ids.

A chat is rendered by the model's chat template. Its answers are learned and the rest is only read: a token that is
read but not learned is encoded as `~token`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.base.errors import ArtefactError, DataError, UsageError
from ...runtime.chat_template import Message, render_chat
from ...runtime.prompt import in_plain_roles
from ...runtime.tool_format import LEARNED_MARK, tool_format

if TYPE_CHECKING:  # efficientllm-corpus and the evaluation of artefacts need no transformers
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""Document separators of the supported families, in order of preference. The EOS token replaces a missing one."""

_ANSWER = "Yes"


@dataclass(frozen=True)
class Chat:
    """A document that is a conversation, possibly with functions."""

    messages: tuple[Message, ...]
    """Messages in OpenAI's form. The content is text, and the arguments of calls are objects. An answer with a weight
    of 0 is read and not learned."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the assistant may call, {"type": "function", "function": {...}}."""
    is_cut: bool = False
    """True if the last answer was cut, so that its turn has no end to learn."""
    form: str = field(default="", compare=False)
    """Name of the form of its record, see records.RECORD_FORMS."""
    place: str = field(default="", compare=False)
    """Place of its record for errors, such as "chats.jsonl: line 3"."""

    @classmethod
    def of(cls, *turns: tuple[str, str], is_cut: bool = False) -> Chat:
        """Return a chat of (role, content) pairs."""
        return cls(tuple({"role": role, "content": content} for role, content in turns), is_cut=is_cut)

    @property
    def text(self) -> str:
        """Return the contents and calls of all messages without the roles."""
        contents = []
        for message in self.messages:
            contents += [message["content"]] if message["content"] else []
            contents += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        return "\n\n".join(contents)

    @property
    def has_functions(self) -> bool:
        """Return True if the chat describes, calls or answers for functions."""
        return bool(self.tools) or any(each["role"] == "tool" or "tool_calls" in each for each in self.messages)

    def to_json(self) -> str:
        """Return the record that records.py parses to this chat, in one line."""
        tools = {"tools": self.tools} if self.tools else {}
        cut = {"cut": True} if self.is_cut else {}
        return json.dumps({"messages": self.messages, **tools, **cut}, ensure_ascii=False)


Document = str | Chat


@dataclass(frozen=True)
class Span:
    """A piece of a rendered chat."""

    text: str
    is_answer: bool
    """True for an answer of the assistant that is learned. It includes the end of its turn."""


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a tokenizer's chat template, or None if it has none or several named ones."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else None


@dataclass(frozen=True)
class ChatFormat:
    """The chat template of a model and the markup around its answers."""

    template: str
    bos_token: str
    eos_token: str
    end_of_turn: str
    """Text after an answer, which the model generates to end its turn."""

    @classmethod
    def of(cls, template: str | None, bos: str, eos: str) -> ChatFormat | None:
        """Return the format of a template, or None if there is no template or it cannot render a plain chat."""
        if not template:
            return None
        question: list[Message] = [{"role": "user", "content": "Well?"}]
        answered = [*question, {"role": "assistant", "content": _ANSWER}]
        try:
            prompt = render_chat(template, question, bos, eos)
            whole = render_chat(template, answered, bos, eos, add_generation_prompt=False)
        except (ArtefactError, UsageError):
            return None
        start = whole.rfind(_ANSWER)
        if start < 0 or not whole.startswith(prompt):
            return None
        return cls(template, bos, eos, whole[start + len(_ANSWER) :].strip() or eos)

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
        """Return the format of a tokenizer's chat template. See `of`."""
        return cls.of(chat_template_of(tokenizer), str(tokenizer.bos_token or ""), str(tokenizer.eos_token or ""))

    def knowing_functions(self) -> ChatFormat:
        """Return the format of a model that is trained on its functions: prompts do not describe them.

        A template that adds a long system message of its own gets an empty one instead.
        """
        question: Message = {"role": "user", "content": "Well?"}
        silent = self._with_empty_system_message()
        try:
            is_shorter = len(silent.prompt([question])) < len(self.prompt([question]))
        except (ArtefactError, UsageError):  # the template has no system messages
            is_shorter = False
        return replace(self, template=LEARNED_MARK + (silent.template if is_shorter else self.template))

    def _with_empty_system_message(self) -> ChatFormat:
        added = """{%- if messages[0]['role'] != 'system' -%}
{%- set messages = [{'role': 'system', 'content': ''}] + messages -%}
{%- endif -%}
"""
        return replace(self, template=added + self.template)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Render messages up to the start of the assistant's next answer."""
        return render_chat(self.template, messages, self.bos_token, self.eos_token)

    def spans(self, chat: Chat) -> list[Span]:
        """Split a rendered chat into spans, in order, up to the end of its last answer.

        Raises DataError if the template rejects the chat or changes earlier turns.
        """
        spans: list[Span] = []
        rendered = ""
        try:
            for index, message in enumerate(chat.messages):
                if message["role"] != "assistant" or not index:  # a greeting answers nothing, and is only read
                    continue
                prompt = self._render(chat, index, add_generation_prompt=True)
                answered = self._render(chat, index + 1, add_generation_prompt=False)
                if not (prompt.startswith(rendered) and answered.startswith(prompt)):
                    raise DataError("the source's chat template rewrites earlier turns; give chats of one question")
                is_learned = message.get("weight", 1) != 0
                spans += [Span(prompt[len(rendered) :], False), Span(answered[len(prompt) :], is_learned)]
                rendered = answered
        except UsageError as error:
            raise DataError(f"a chat of {len(chat.messages)} turns: {error}") from error
        if chat.is_cut and spans:  # without the end of the turn, which the model did not write
            answer, content = spans[-1].text, chat.messages[-1]["content"].strip()
            end = answer.rfind(content) + len(content)
            spans[-1] = Span(answer[:end], True)
        return spans

    def chat_prompt(self, chat: Chat) -> str:
        """Render a whole chat, with its functions, up to the start of the assistant's next answer."""
        return self._render(chat, len(chat.messages), add_generation_prompt=True)

    def _render(self, chat: Chat, count: int, *, add_generation_prompt: bool) -> str:
        """Render the first `count` messages as the runtime renders them for an answer.

        If the template has no functions, their descriptions, calls and results become text, as in the server.
        """
        messages: Sequence[Message] = chat.messages[:count]
        tools = chat.tools
        format = tool_format(self.template, self.bos_token, self.eos_token)
        if chat.has_functions and not format.is_from_template:
            messages, tools = in_plain_roles(messages, tools, format), ()
        return render_chat(
            self.template,
            messages,
            self.bos_token,
            self.eos_token,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
        )


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that separates documents. Raises DataError if there is none."""
    vocabulary = tokenizer.get_vocab()
    for token in END_OF_TEXT:
        if token in vocabulary:
            return vocabulary[token]
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError("the tokenizer has no end-of-text or EOS token to separate documents with")
    return tokenizer.eos_token_id


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens."""
    backend: Any = tokenizer.backend_tokenizer
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def learn_functions(tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the tokenizer's chat template by that of a model that is trained on its functions.

    Raises UsageError without a chat template.
    """
    chat_format = ChatFormat.of_tokenizer(tokenizer)
    if chat_format is None:
        raise UsageError("--functions learned: the source has no chat template; use a chat model")
    tokenizer.chat_template = chat_format.knowing_functions().template


class Encoder:
    """Converts documents to token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.separator = end_of_text_id(tokenizer)
        self.chat_format = ChatFormat.of_tokenizer(tokenizer)

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Return the ids of each document, int32 [n].

        A text ends with the end-of-text token and a chat with the end of a turn. Raises DataError for a chat that the
        source's template cannot render.
        """
        # all texts in one call, which tokenizers encodes in parallel
        texts = iter(tokenize(self.tokenizer, [each for each in documents if isinstance(each, str)]))
        found = []
        for document in documents:
            if isinstance(document, Chat):
                found.append(self._encode_chat(document))
            else:
                found.append(np.asarray([*next(texts), self.separator], np.int32))
        return found

    def _encode_chat(self, chat: Chat) -> np.ndarray:
        if self.chat_format is None:
            raise DataError("the text holds chats (messages), and the source has no chat template to write them with")
        try:
            spans = self.chat_format.spans(chat)
            if not spans:
                raise DataError("a chat has no answer to learn: no message of the role assistant follows another one")
        except DataError as error:
            raise DataError(f"--data {chat.place}: {error}" if chat.place else str(error)) from error
        ids_of_spans = tokenize(self.tokenizer, [span.text for span in spans])
        parts = []
        for ids, span in zip(ids_of_spans, spans, strict=True):
            part = np.asarray(ids, np.int32)
            parts.append(part if span.is_answer else ~part)
        return np.concatenate(parts)
