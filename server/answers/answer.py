"""Answers in OpenAI's JSON: chat and text completions, whole or as server-sent events."""

from __future__ import annotations

import abc
import itertools
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...runtime.call_reader import Argued, Called, Event, Said
from ...runtime.generation import TokenLogprob
from ..models.metrics import AnswerClock
from ..models.worker import Piece
from ..schemas.completions import ChatRequest, CompletionRequest
from ..schemas.error import APIError
from .choices import Choice


@dataclass
class Collected:
    """One choice, gathered from its pieces."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """OpenAI's tool_calls."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, events: Iterable[Event]) -> None:
        """Take in what a piece says and calls."""
        for event in events:
            if isinstance(event, Said):
                self.text += event.text
            elif isinstance(event, Called):
                self.calls.append(begun_call(event))
            else:
                self.calls[event.index]["function"]["arguments"] += event.text


def begun_call(event: Called) -> dict[str, Any]:
    """OpenAI's tool call, without arguments yet."""
    identity = f"call_{uuid.uuid4().hex[:24]}"
    return {"id": identity, "type": "function", "function": {"name": event.name, "arguments": ""}}


class Answer(abc.ABC):
    """One request's answer."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, request: CompletionRequest, choices: Sequence[Choice], clock: AnswerClock) -> None:
        self.request, self.choices, self.clock = request, choices, clock
        self.token_bytes: dict[int, bytes] = {}
        identity = f"{self.prefix}-{uuid.uuid4().hex}"
        self.base = {"id": identity, "created": int(time.time()), "model": request.model}

    def usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices it has; cached is what its first choice found in the cache."""
        generations = [choice.generation for choice in self.choices]
        prompts = [generation.stats for generation in generations[:: self.request.n]]
        prompt = sum(stats.prompt_tokens for stats in prompts)
        completion = sum(generation.stats.completion_tokens for generation in generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(stats.cached_tokens for stats in prompts)},
        }

    async def pieces(self, source: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
        """`source`, timed."""
        has_begun = False
        try:
            async for piece in source:
                has_begun = True
                self.token_bytes |= piece.token_bytes
                if piece.text:
                    self.clock.record_piece(piece.tokens)
                yield piece
        finally:
            await source.aclose()
            if has_begun:
                usage = self.usage()
                self.clock.record_end(usage["prompt_tokens"], usage["completion_tokens"])

    def read(self, piece: Piece) -> list[Event]:
        """What a piece says and calls."""
        reader = self.choices[piece.choice].reader
        if reader is None:
            return [Said(piece.text)] if piece.text else []
        return reader.push(piece.text) + (reader.finish() if piece.finish_reason else [])

    def reason(self, piece: Piece) -> str | None:
        """Why the choice ends, on its last piece."""
        reader = self.choices[piece.choice].reader
        has_calls = reader is not None and reader.num_calls > 0
        return "tool_calls" if has_calls and piece.finish_reason == "stop" else piece.finish_reason

    async def collect(self, pieces: AsyncGenerator[Piece]) -> list[Collected]:
        """All choices, when they are whole."""
        collected = [Collected(choice.echo) for choice in self.choices]
        async for piece in pieces:
            choice = collected[piece.choice]
            choice.add(self.read(piece))
            choice.logprobs += piece.logprobs
            choice.finish_reason = self.reason(piece) or choice.finish_reason
        return collected

    async def whole(self, pieces: AsyncGenerator[Piece]) -> dict[str, Any]:
        """The answer in one object: openapi.ChatCompletion or TextCompletion."""
        choices = []
        for index, collected in enumerate(await self.collect(pieces)):
            choice = {**self._content(collected), "index": index, "finish_reason": collected.finish_reason}
            choices.append({**choice, "logprobs": self._logprobs(index, collected.logprobs)})
        return {**self.base, "object": self.kind, "choices": choices, "usage": self.usage()}

    async def events(self, first: Piece | None, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
        """Server-sent events; `first` has been taken off `pieces` already."""
        try:
            for delta in self._openings():
                yield self._event(delta)
            if first is not None:
                for event in self._piece_events(first):
                    yield event
            async for piece in pieces:
                for event in self._piece_events(piece):
                    yield event
        except APIError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            chunk = {**self.base, "object": self.chunk_kind, "choices": [], "usage": self.usage()}
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    def _piece_events(self, piece: Piece) -> Iterable[str]:
        """An event for every part; log-probabilities come with the first, the reason with the last."""
        events = self.read(piece)
        deltas = [self._delta(event) for event in events] or [self._delta(None)]
        for index, delta in enumerate(deltas):
            records = piece.logprobs if index == 0 else ()
            reason = self.reason(piece) if index == len(deltas) - 1 else None
            if not events and not records and reason is None:
                continue
            choice = {**delta, "index": piece.choice, "finish_reason": reason}
            yield self._event({**choice, "logprobs": self._logprobs(piece.choice, records)})

    def _event(self, choice: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.base, 'object': self.chunk_kind, 'choices': [choice]})}\n\n"

    def _text_of(self, token: int) -> str:
        return self.token_bytes[token].decode("utf-8", errors="replace")

    @abc.abstractmethod
    def _content(self, collected: Collected) -> dict[str, Any]:
        """The part of a whole answer's choice that holds its text."""

    @abc.abstractmethod
    def _delta(self, event: Event | None) -> dict[str, Any]:
        """The part of an event's choice that holds its text; None where there is nothing new."""

    @abc.abstractmethod
    def _openings(self) -> Iterable[dict[str, Any]]:
        """Choices of the events before the first piece."""

    @abc.abstractmethod
    def _logprobs(self, choice: int, records: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Log-probabilities of a choice's next tokens as the endpoint shows them; None where none were asked for."""


class ChatAnswer(Answer):
    """chat.completion"""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _content(self, collected: Collected) -> dict[str, Any]:
        if not collected.calls:
            return {"message": {"role": "assistant", "content": collected.text, "refusal": None}}
        content = collected.text.strip() or None
        return {"message": {"role": "assistant", "content": content, "refusal": None, "tool_calls": collected.calls}}

    def _delta(self, event: Event | None) -> dict[str, Any]:
        if isinstance(event, Said):
            return {"delta": {"content": event.text}}
        if isinstance(event, Called):
            return {"delta": {"tool_calls": [{"index": event.index, **begun_call(event)}]}}
        if isinstance(event, Argued):
            return {"delta": {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}}
        return {"delta": {}}

    def _openings(self) -> Iterable[dict[str, Any]]:
        for index in range(len(self.choices)):
            yield {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def _logprobs(self, choice: int, records: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        assert isinstance(self.request, ChatRequest)
        if not self.request.logprobs:
            return None
        content = [
            {
                **self._token(record.token, record.logprob),
                "top_logprobs": [self._token(token, value) for token, value in record.top],
            }
            for record in records
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text_of(token), "logprob": logprob, "bytes": list(self.token_bytes[token])}


class TextAnswer(Answer):
    """text_completion"""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, request: CompletionRequest, choices: Sequence[Choice], clock: AnswerClock) -> None:
        super().__init__(request, choices, clock)
        self._written = [0] * len(choices)
        """Characters of the tokens so far, by choice."""

    def _content(self, collected: Collected) -> dict[str, Any]:
        return {"text": collected.text}

    def _delta(self, event: Event | None) -> dict[str, Any]:
        return {"text": event.text if isinstance(event, Said) else ""}

    def _openings(self) -> Iterable[dict[str, Any]]:
        for index, choice in enumerate(self.choices):
            if choice.echo:
                yield {"index": index, "text": choice.echo, "finish_reason": None, "logprobs": None}

    def _logprobs(self, choice: int, records: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.request.top_count is None:
            return None
        texts = [self._text_of(record.token) for record in records]
        offsets = list(itertools.accumulate(map(len, texts), initial=self._written[choice]))
        self._written[choice] = offsets[-1]
        return {
            "tokens": texts,
            "token_logprobs": [record.logprob for record in records],
            "top_logprobs": [{self._text_of(token): value for token, value in record.top} for record in records],
            "text_offset": offsets[:-1],
        }
