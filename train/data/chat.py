"""Chats: what was said by whom, and how a model's chat template writes it, with the part that is the assistant's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...runtime.base.errors import ArtefactError, DataError, UsageError
from ...runtime.chat_template import Message, render_chat

if TYPE_CHECKING:  # evaluation of an artefact needs no torch
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
