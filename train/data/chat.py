"""Documents, chats, and their token ids.

A chat is rendered by the model's chat template. Its answers are learned and the rest is only read: a token that is
read but not learned is encoded as `~token`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.base.errors import ArtefactError, DataError, UsageError
from ...runtime.chat_template import Message, render_chat
from ...runtime.prompt import in_job, in_plain_roles
from ...runtime.tool_format import JOB_MARK, LEARNED_MARK, ToolFormat, tool_format

if TYPE_CHECKING:  # the evaluation of artefacts needs no transformers
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

    def in_job(self, job: str) -> Chat:
        """Return this chat with the name of a job in its system message. A greeting stays unlearned after it."""
        first, *others = self.messages
        if job and first["role"] == "assistant":
            first = {**first, "weight": 0}
        return replace(self, messages=tuple(in_job([first, *others], job)))

    @property
    def text(self) -> str:
        """Return the contents and calls of all messages without the roles."""
        contents = []
        for message in self.messages:
            contents += [message["content"]] if message["content"] else []
            contents += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        return "\n\n".join(contents)

    @property
    def answers(self) -> list[int]:
        """Return the indices of the assistant's answers. A greeting answers nothing."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant" and index]

    def is_learned(self, index: int) -> bool:
        """Return False for an answer with a weight of 0."""
        return self.messages[index].get("weight", 1) != 0

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
    header: str = ""
    """Text that the generation prompt adds to the question, "" if the template writes an answer in another way."""
    after: str = ""
    """All text after the answer, which ends its turn in a conversation."""
    _num_chats: Counter[tuple[tuple[str, bool], ...]] = field(default_factory=Counter, init=False, compare=False)
    """Number of chats by the roles of their messages and whether they call."""

    @classmethod
    def of(cls, template: str | None, bos: str, eos: str) -> ChatFormat | None:
        """Return the format of a template, or None if there is no template or it cannot render a plain chat."""
        if not template:
            return None
        question: list[Message] = [{"role": "user", "content": "Well?"}]
        answered = [*question, {"role": "assistant", "content": _ANSWER}]
        try:
            asked = render_chat(template, question, bos, eos, add_generation_prompt=False)
            prompt = render_chat(template, question, bos, eos)
            whole = render_chat(template, answered, bos, eos, add_generation_prompt=False)
        except (ArtefactError, UsageError):
            return None
        start = whole.rfind(_ANSWER)
        if start < 0 or not whole.startswith(prompt):
            return None
        after = whole[start + len(_ANSWER) :]
        has_header = prompt.startswith(asked) and start == len(prompt)
        return cls(template, bos, eos, after.strip() or eos, prompt[len(asked) :] if has_header else "", after)

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

        The chat is rendered once, and its answers are found by the texts around them. If they are not found, it is
        rendered up to the start and the end of each answer. So are the chats number 1, 2, 4, 8, ... of the same roles.
        Raises DataError if the template rejects the chat or changes earlier turns.
        """
        shape = tuple((each["role"], "tool_calls" in each) for each in chat.messages)
        self._num_chats[shape] += 1
        try:
            spans = self._spans_of_one_rendering(chat) if self._num_chats[shape].bit_count() != 1 else None
            spans = self._spans_by_turns(chat) if spans is None else spans
        except UsageError as error:
            raise DataError(f"a chat of {len(chat.messages)} turns: {error}") from error
        if chat.is_cut and spans:  # without the end of the turn, which the model did not write
            answer, content = spans[-1].text, chat.messages[-1]["content"].strip()
            end = answer.rfind(content) + len(content)
            spans[-1] = Span(answer[:end], True)
        return spans

    def _spans_by_turns(self, chat: Chat) -> list[Span]:
        """Render the chat up to the start and the end of each answer."""
        spans: list[Span] = []
        rendered = ""
        for index in chat.answers:
            prompt = self._render(chat, index, add_generation_prompt=True)
            answered = self._render(chat, index + 1, add_generation_prompt=False)
            if not (prompt.startswith(rendered) and answered.startswith(prompt)):
                raise DataError("the chat template rewrites earlier turns; give chats of one question")
            spans += [Span(prompt[len(rendered) :], False), Span(answered[len(prompt) :], chat.is_learned(index))]
            rendered = answered
        return spans

    def _spans_of_one_rendering(self, chat: Chat) -> list[Span] | None:
        """Return the spans if each answer stands between the texts around answers, and these occur nowhere else."""
        answers = chat.answers
        if not self.header or not self.after or not answers:
            return None
        whole = self._render(chat, answers[-1] + 1, add_generation_prompt=False)
        before, *parts = whole.split(self.header)
        greetings = [message for message in chat.messages[:1] if message["role"] == "assistant"]
        if len(parts) != len(answers) + len(greetings):
            return None
        messages, format = self._arranged(chat, answers[-1] + 1)[0], self._tool_format()
        texts = [_written(each, format) for each in messages if each["role"] == "assistant"]
        spans: list[Span] = []
        for index, (part, text) in enumerate(zip(parts, texts, strict=True), -len(greetings)):
            end = next((each + self.after for each in (text, text.strip()) if part.startswith(each + self.after)), "")
            if not end:
                return None
            before += self.header
            if index < 0:
                before += part
                continue
            spans += [Span(before, False), Span(end, chat.is_learned(answers[index]))]
            before = part[len(end) :]
        return spans if not before else None

    def chat_prompt(self, chat: Chat) -> str:
        """Render a whole chat, with its functions, up to the start of the assistant's next answer."""
        return self._render(chat, len(chat.messages), add_generation_prompt=True)

    def _tool_format(self) -> ToolFormat:
        return tool_format(self.template, self.bos_token, self.eos_token)

    def _arranged(self, chat: Chat, count: int) -> tuple[Sequence[Message], Sequence[Mapping[str, Any]]]:
        """Return the first `count` messages and the functions as the runtime gives them to the template.

        If the template has no functions, their descriptions, calls and results become text, as in the server.
        """
        messages, format = chat.messages[:count], self._tool_format()
        if not chat.has_functions or format.is_from_template:
            return messages, chat.tools
        return in_plain_roles(messages, chat.tools, format)

    def _render(self, chat: Chat, count: int, *, add_generation_prompt: bool) -> str:
        """Render the first `count` messages as the runtime renders them for an answer."""
        messages, tools = self._arranged(chat, count)
        bos, eos = self.bos_token, self.eos_token
        return render_chat(self.template, messages, bos, eos, add_generation_prompt=add_generation_prompt, tools=tools)


def _written(message: Message, format: ToolFormat) -> str:
    """Return the text of an answer, with its calls if the template writes them."""
    writes = format.is_from_template or format.writes_calls
    calls = format.write(message["tool_calls"]) if "tool_calls" in message and writes else ""
    return message["content"] + calls


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


def check_answers(format: ChatFormat | None) -> None:
    """Raise UsageError for the format of a template of --chat-template that no answer can be found in."""
    if format is None:
        raise UsageError(
            "--chat-template: it does not write an answer behind the prompt of its question; write each message, and "
            "the start of an answer if add_generation_prompt is true"
        )


def check_jobs(format: ChatFormat | None, jobs: Collection[str]) -> None:
    """Raise UsageError if a chat template does not write the system message that names a job."""
    question: Message = {"role": "user", "content": "Well?"}
    for job in filter(None, jobs):
        if format is not None and job not in format.prompt(in_job([question], job)):
            raise UsageError(f"@{job}: the chat template drops the system message, which names the job; write it")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str, is_learned: bool) -> None:
    """Give a tokenizer the job's own `template`, "" for the source's, or that of a model that knows its functions.

    Raises UsageError without a chat template, and for one that no answer can be found in.
    """
    if template:
        tokenizer.chat_template = JOB_MARK + template if is_learned else template
    chat_format = ChatFormat.of_tokenizer(tokenizer)
    if template:
        check_answers(chat_format)
    if not is_learned or str(tokenizer.chat_template).startswith(JOB_MARK):
        return
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
