"""Build answers in OpenAI's JSON, whole or as server-sent events: chat and text completions.

Whole answers are instances of the response models. Events are not part of the OpenAPI document. They are plain dicts
with response models inside, because an event is built for every token.
"""

from __future__ import annotations

import abc
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from ...runtime.call_reader import ArgumentsEvent, CallEvent, Event, ReasoningEvent, TextEvent
from ...runtime.cautious_reader import CautiousReader
from ...runtime.generation import TokenLogprob
from ..models.worker import Piece
from ..schemas.api_error import APIError
from ..schemas.completions import ChatRequest, CompletionRequest
from ..schemas.response_models import (
    AnsweredCall,
    AnsweredFunction,
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    CompletionTokensDetails,
    PromptTokensDetails,
    ResponseModel,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    Timings,
    Usage,
)
from .choices import Choice

FINGERPRINT = f"b{version('efficientllm')}"
"""The build of the server, as llama-server writes it."""


@dataclass
class CollectedChoice:
    """The content of one choice, collected from its pieces."""

    text: str
    reasoning: str = ""
    calls: list[AnsweredCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: Any = None

    def add(self, event: Event) -> None:
        """Append the text or the part of a call that `event` carries."""
        if isinstance(event, TextEvent):
            self.text += event.text
        elif isinstance(event, ReasoningEvent):
            self.reasoning += event.text
        elif isinstance(event, CallEvent):
            self.calls.append(new_call(event))
        else:
            self.calls[event.index].function.arguments += event.text


def new_call(event: CallEvent) -> AnsweredCall:
    """Return a call with a new id and no arguments yet."""
    return AnsweredCall(id=f"call_{uuid.uuid4().hex[:24]}", function=AnsweredFunction(name=event.name, arguments=""))


async def with_first(first: Piece | None, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
    """Yield `first`, unless it is None, and `pieces`."""
    if first is not None:
        yield first
    async for piece in pieces:
        yield piece


class CompletionBuilder(abc.ABC):
    """Builds the answer to one request from the pieces of its choices."""

    media_type = "text/event-stream"
    ping = ": ping\n\n"
    """Text of a stream that clients ignore."""
    id_prefix: str
    """Start of the id of an answer, with its separator."""
    chunk_object: str
    response_model: type[ResponseModel]

    def __init__(self, request: CompletionRequest, choices: Sequence[Choice], began: float) -> None:
        """`began` is the time of the request by time.perf_counter."""
        self.request, self.choices, self.began = request, choices, began
        self.token_bytes: dict[int, bytes] = {}
        identity = f"{self.id_prefix}{uuid.uuid4().hex}"
        self.base: dict[str, Any] = {"id": identity, "created": int(time.time()), "model": request.model}

    def timings(self, choice: int = 0) -> Timings:
        """Return counts and times of a choice."""
        stats = self.choices[choice].generation.stats
        prompt_ms, predicted_ms = stats.time_to_first_token_ms, 1e3 * stats.decode_seconds
        return Timings(
            cache_n=stats.cached_tokens,
            prompt_n=stats.prefilled_tokens,
            prompt_ms=prompt_ms,
            prompt_per_token_ms=prompt_ms / max(1, stats.prefilled_tokens),
            prompt_per_second=stats.prefill_tokens_per_second,
            predicted_n=stats.completion_tokens,
            predicted_ms=predicted_ms,
            predicted_per_token_ms=predicted_ms / max(1, stats.completion_tokens - stats.first_tokens),
            predicted_per_second=stats.decode_tokens_per_second,
            draft_n=stats.drafted_tokens,
            draft_n_accepted=stats.accepted_tokens,
            confidence=self.confidence(choice),
        )

    def confidence(self, choice: int = 0) -> float | None:
        """Return the probability that the calls of a choice are right. None without calls or without a calibration."""
        reader = self.choices[choice].reader
        return reader.confidence if isinstance(reader, CautiousReader) else None

    def usage(self) -> Usage:
        """Return the token counts. A prompt counts once for all its choices; its first choice tells its cached part."""
        stats = [choice.generation.stats for choice in self.choices]
        prompts = stats[:: self.request.n]
        prompt_tokens = sum(each.prompt_tokens for each in prompts)
        completion_tokens = sum(each.completion_tokens for each in stats)
        accepted = sum(each.accepted_tokens for each in stats)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(each.cached_tokens for each in prompts)),
            completion_tokens_details=CompletionTokensDetails(
                passes=sum(each.passes for each in stats),
                accepted_prediction_tokens=accepted,
                rejected_prediction_tokens=sum(each.drafted_tokens for each in stats) - accepted,
            ),
        )

    async def pieces(self, source: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
        """Yield the pieces of `source`, and keep the bytes of their tokens."""
        try:
            async for piece in source:
                self.token_bytes |= piece.token_bytes
                yield piece
        finally:
            await source.aclose()  # frees the engine, also if the client is gone

    def read(self, piece: Piece) -> list[Event]:
        """Return the reasoning, the text and the parts of calls in a piece."""
        reader = self.choices[piece.choice].reader
        if reader is None:
            return [TextEvent(piece.text)] if piece.text else []
        return reader.push(piece.text) + (reader.finish() if piece.finish_reason else [])

    def finish_reason(self, piece: Piece) -> str | None:
        """Return the reason for the end of a choice, None unless `piece` is its last."""
        reader = self.choices[piece.choice].reader
        has_calls = reader is not None and reader.num_calls > 0
        return "tool_calls" if has_calls and piece.finish_reason == "stop" else piece.finish_reason

    async def whole(self, pieces: AsyncGenerator[Piece]) -> ResponseModel:
        """Return the answer in one object, after the last piece."""
        collected = [CollectedChoice(choice.echo) for choice in self.choices]
        async for piece in pieces:
            choice = collected[piece.choice]
            for event in self.read(piece):
                choice.add(event)
            choice.logprobs += piece.logprobs
            choice.finish_reason = self.finish_reason(piece) or choice.finish_reason
        choices = []
        for index, each in enumerate(collected):
            logprobs = self._logprobs(index, each.logprobs)
            common = {"index": index, "finish_reason": each.finish_reason, "logprobs": logprobs}
            choices.append(self._choice(each, common))
        whole = {**self.base, "system_fingerprint": FINGERPRINT, "timings": self.timings()}
        return self.response_model.model_validate({**whole, "choices": choices, "usage": self.usage()})

    async def events(self, first: Piece | None, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
        """Yield server-sent events of `first` and of the rest of `pieces`."""
        try:
            for choice in self._openings():
                yield self._event(choices=[choice])
            async for piece in with_first(first, pieces):
                if piece.is_ping:
                    yield self.ping
                choices, timed = [*self._piece_choices(piece)], {}
                if piece.finish_reason or (self.request.timings_per_token and not piece.is_ping):
                    timed = {"timings": self.timings(piece.choice).model_dump()}
                for choice in choices:
                    yield self._event(choices=[choice], **timed)
        except APIError as error:  # the status was sent with the first event, so only the stream can tell
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            yield self._event(choices=[], usage=self.usage().model_dump(), timings=self.timings().model_dump())
        yield "data: [DONE]\n\n"

    def _piece_choices(self, piece: Piece) -> Iterable[dict[str, Any]]:
        """Yield the choice of an event for each part of a piece.

        Log-probabilities are sent with the first part, the finish reason with the last.
        """
        events = self.read(piece)
        deltas = [self._delta(event) for event in events] or [self._delta(None)]
        for index, delta in enumerate(deltas):
            records = piece.logprobs if index == 0 else ()
            reason = self.finish_reason(piece) if index == len(deltas) - 1 else None
            if not events and not records and reason is None:
                continue
            logprobs = self._logprobs(piece.choice, records)
            shown = logprobs.model_dump() if logprobs is not None else None
            yield {**delta, "index": piece.choice, "finish_reason": reason, "logprobs": shown}

    def _event(self, **fields: Any) -> str:
        common = {**self.base, "object": self.chunk_object, "system_fingerprint": FINGERPRINT}
        return f"data: {json.dumps(common | fields)}\n\n"

    def token_fields(self, token: int, logprob: float | None) -> dict[str, Any]:
        """Return a token with its log-probability."""
        return {"token": self._text_of(token), "logprob": logprob, "bytes": list(self.token_bytes[token])}

    def _text_of(self, token: int) -> str:
        return self.token_bytes[token].decode("utf-8", errors="replace")

    @abc.abstractmethod
    def _choice(self, collected: CollectedChoice, common: dict[str, Any]) -> ResponseModel:
        """Return a choice of a whole answer. `common` are the fields that both endpoints have."""

    @abc.abstractmethod
    def _openings(self) -> Iterable[dict[str, Any]]:
        """Yield the choices of the events that come before the first piece."""

    @abc.abstractmethod
    def _delta(self, event: Event | None) -> dict[str, Any]:
        """Return the part of an event's choice that carries new text or a part of a call."""

    @abc.abstractmethod
    def _logprobs(self, choice: int, records: Sequence[TokenLogprob]) -> ResponseModel | None:
        """Return the log-probabilities of the next tokens of a choice, None if the request asks for none."""


class ChatBuilder(CompletionBuilder):
    """Builds chat completions."""

    id_prefix, chunk_object, response_model = "chatcmpl-", "chat.completion.chunk", ChatCompletion

    def _choice(self, collected: CollectedChoice, common: dict[str, Any]) -> ChatChoice:
        calls = collected.calls
        content: str | None = collected.text
        if calls:  # the white space around calls is no text
            content = collected.text.strip() or None
        message = AssistantMessage(reasoning_content=collected.reasoning, content=content, tool_calls=calls)
        return ChatChoice(message=message, **common)

    def _openings(self) -> Iterable[dict[str, Any]]:
        for index in range(len(self.choices)):
            yield {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def _delta(self, event: Event | None) -> dict[str, Any]:
        if isinstance(event, TextEvent):
            return {"delta": {"content": event.text}}
        if isinstance(event, ReasoningEvent):
            return {"delta": {"reasoning_content": event.text}}
        if isinstance(event, CallEvent):
            return {"delta": {"tool_calls": [{"index": event.index, **new_call(event).model_dump()}]}}
        if isinstance(event, ArgumentsEvent):
            return {"delta": {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}}
        return {"delta": {}}

    def _logprobs(self, choice: int, records: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        assert isinstance(self.request, ChatRequest)
        if not self.request.logprobs:
            return None
        content = []
        for record in records:
            top = [self.token_fields(token, logprob) for token, logprob in record.top]
            content.append({**self.token_fields(record.token, record.logprob), "top_logprobs": top})
        return ChatLogprobs.model_validate({"content": content})  # faster than an instance for each token


class TextBuilder(CompletionBuilder):
    """Builds text completions."""

    id_prefix, chunk_object, response_model = "cmpl-", "text_completion", TextCompletion

    def __init__(self, request: CompletionRequest, choices: Sequence[Choice], began: float) -> None:
        super().__init__(request, choices, began)
        self._num_characters = [0] * len(choices)
        """Characters of the tokens so far, by choice."""

    def _choice(self, collected: CollectedChoice, common: dict[str, Any]) -> TextChoice:
        return TextChoice(text=collected.text, **common)

    def _openings(self) -> Iterable[dict[str, Any]]:
        for index, choice in enumerate(self.choices):
            if choice.echo:
                yield {"index": index, "text": choice.echo, "finish_reason": None, "logprobs": None}

    def _delta(self, event: Event | None) -> dict[str, Any]:
        return {"text": event.text if isinstance(event, TextEvent) else ""}

    def _logprobs(self, choice: int, records: Sequence[TokenLogprob]) -> TextLogprobs | None:
        if self.request.top_count is None:
            return None
        texts, offsets, tops = [], [], []
        for record in records:
            text = self._text_of(record.token)
            texts.append(text)
            offsets.append(self._num_characters[choice])
            self._num_characters[choice] += len(text)
            top = {self._text_of(token): logprob for token, logprob in record.top}
            tops.append(None if record.logprob is None else top)
        logprobs: list[Any] = [record.logprob for record in records]
        return TextLogprobs(tokens=texts, token_logprobs=logprobs, top_logprobs=tops, text_offset=offsets)
