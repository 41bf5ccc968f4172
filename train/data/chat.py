"""A model's chat template seen as text: prompts, where a turn ends, and which part of a conversation is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.base.errors import ArtefactError, UsageError
from ...runtime.chat_template import Message, render_chat

_ANSWER = "Yes"


@dataclass(frozen=True)
class Span:
    """A piece of a rendered conversation."""

    text: str
    is_answer: bool
    """Whether it is what the assistant says, the end of its turn included."""


@dataclass(frozen=True)
class ChatFormat:
    """How a model's chats are written."""

    template: str
    bos_token: str
    eos_token: str
    end_of_turn: str
    """What follows an answer: the model says it to end its turn."""

    @classmethod
    def of(cls, template: str | None, bos_token: str | None, eos_token: str | None) -> ChatFormat | None:
        """The format of a tokenizer's template; None where it has none, or one that cannot write a plain chat."""
        if not template:
            return None
        bos, eos = bos_token or "", eos_token or ""
        user = {"role": "user", "content": "Well?"}
        try:
            prompt = render_chat(template, [user], bos, eos)
            whole = render_chat(
                template, [user, {"role": "assistant", "content": _ANSWER}], bos, eos, add_generation_prompt=False
            )
        except (ArtefactError, UsageError):
            return None
        start = whole.rfind(_ANSWER)
        if start < 0 or not whole.startswith(prompt):
            return None
        return cls(template, bos, eos, whole[start + len(_ANSWER) :].strip() or eos)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Text up to where the assistant's next answer begins."""
        return render_chat(self.template, messages, self.bos_token, self.eos_token)

    def spans(self, messages: Sequence[Message]) -> list[Span]:
        """A conversation in pieces, in order. UsageError where the template refuses it."""
        spans: list[Span] = []
        written = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = messages[:index], messages[: index + 1]
            asked = self.prompt(before)
            answered = render_chat(self.template, after, self.bos_token, self.eos_token, add_generation_prompt=False)
            if not (asked.startswith(written) and answered.startswith(asked)):
                raise UsageError(
                    "the chat template rewrites earlier turns: its chats cannot be trained on turn by turn"
                )
            spans += [Span(asked[len(written) :], False), Span(answered[len(asked) :], True)]
            written = answered
        return spans
