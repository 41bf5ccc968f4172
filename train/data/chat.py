"""Chats: what was said by whom, and how a model's chat template writes it, with the part that is the assistant's.

From documents to token ids. A token that is read but not learned, as a user's words, is given as ~token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...runtime.base.errors import ArtefactError, DataError, UsageError
from ...runtime.chat_template import Message, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ANSWER = "Yes"


@dataclass(frozen=True)
class Chat:
    """A document that is a conversation."""

    turns: tuple[tuple[str, str], ...]
    """(role, content): system, user and assistant."""
    is_cut: bool = False
    """Whether the last answer goes on: nothing says that its turn ends there."""

    @property
    def messages(self) -> list[Message]:
        return [{"role": role, "content": content} for role, content in self.turns]

    @property
    def text(self) -> str:
        """What is said, without who says it."""
        return "\n\n".join(content for _, content in self.turns)

    def to_json(self) -> str:
        return json.dumps({"messages": self.messages, **({"cut": True} if self.is_cut else {})}, ensure_ascii=False)


Document = str | Chat


@dataclass(frozen=True)
class Span:
    """A piece of a rendered conversation."""

    text: str
    is_answer: bool
    """Whether it is what the assistant says, the end of its turn included."""


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A tokenizer's chat template; None where it has none, or several by name."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else None


@dataclass(frozen=True)
class ChatFormat:
    """How a model's chats are written."""

    template: str
    bos_token: str
    eos_token: str
    end_of_turn: str
    """What follows an answer: the model says it to end its turn."""

    @classmethod
    def of(cls, template: str | None, bos: str, eos: str) -> ChatFormat | None:
        """The format of a template; None where there is none, or one that cannot write a plain chat."""
        if not template:
            return None
        asked: list[Message] = [{"role": "user", "content": "Well?"}]
        answered = [*asked, {"role": "assistant", "content": _ANSWER}]
        try:
            prompt = render_chat(template, asked, bos, eos)
            whole = render_chat(template, answered, bos, eos, add_generation_prompt=False)
        except (ArtefactError, UsageError):
            return None
        start = whole.rfind(_ANSWER)
        if start < 0 or not whole.startswith(prompt):
            return None
        return cls(template, bos, eos, whole[start + len(_ANSWER) :].strip() or eos)

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
        return cls.of(template_of(tokenizer), str(tokenizer.bos_token or ""), str(tokenizer.eos_token or ""))

    def prompt(self, messages: Sequence[Message]) -> str:
        """Text up to where the assistant's next answer begins."""
        return render_chat(self.template, messages, self.bos_token, self.eos_token)

    def spans(self, chat: Chat) -> list[Span]:
        """A conversation in pieces, in order, up to its last answer. DataError where the template refuses it."""
        spans: list[Span] = []
        written, messages = "", chat.messages
        try:
            for index, (role, _) in enumerate(chat.turns):
                if role != "assistant":
                    continue
                asked, answered = self.prompt(messages[:index]), self._written(messages[: index + 1])
                if not (asked.startswith(written) and answered.startswith(asked)):
                    raise DataError("the source's chat template rewrites earlier turns; give chats of one question")
                spans += [Span(asked[len(written) :], False), Span(answered[len(asked) :], True)]
                written = answered
            if chat.is_cut and spans:
                whole, content = spans[-1].text, chat.turns[-1][1].strip()
                spans[-1] = Span(whole[: whole.rfind(content) + len(content)], True)
        except UsageError as error:
            raise DataError(f"a chat of {len(chat.turns)} turns: {error}") from error
        return spans

    def _written(self, messages: Sequence[Message]) -> str:
        return render_chat(self.template, messages, self.bos_token, self.eos_token, add_generation_prompt=False)


END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""Document separators of the supported families, in order of preference; the EOS token otherwise."""


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's end-of-text token."""
    vocabulary = tokenizer.get_vocab()
    for token in END_OF_TEXT:
        if token in vocabulary:
            return vocabulary[token]
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError("the tokenizer has no end-of-text or EOS token to separate documents with")
    return tokenizer.eos_token_id


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    backend: Any = tokenizer.backend_tokenizer
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


class Encoder:
    """Documents as arrays of ids: text with its end-of-text token, chats as the tokenizer's template writes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.separator = end_of_text_id(tokenizer)
        self.chat = ChatFormat.of_tokenizer(tokenizer)

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """int32 [n] of each; DataError for a chat that the source's template cannot write."""
        texts = iter(tokenize(self.tokenizer, [each for each in documents if isinstance(each, str)]))
        return [
            self._chat(each) if isinstance(each, Chat) else np.asarray([*next(texts), self.separator], np.int32)
            for each in documents
        ]

    def _chat(self, chat: Chat) -> np.ndarray:
        """Answers and the ends of their turns are learned; a chat ends with a turn, not with the end of a text."""
        if self.chat is None:
            raise DataError("the text holds chats (messages), and the source has no chat template to write them with")
        spans = self.chat.spans(chat)
        if not spans:
            raise DataError("a chat has no answer to learn: no message of the role assistant")
        ids = [np.asarray(each, np.int32) for each in tokenize(self.tokenizer, [span.text for span in spans])]
        return np.concatenate([each if span.is_answer else ~each for each, span in zip(ids, spans, strict=True)])
