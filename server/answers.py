"""Answers in OpenAI's JSON: chat and text completions, whole or as server-sent events."""

from __future__ import annotations

import abc
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

from ..runtime.generation import Generation, TokenLogprob
from .metrics import AnswerClock
from .schemas import APIError, ChatRequest, CompletionRequest
from .worker import Piece


class Answer(abc.ABC):
    """One request's answer; `generations` are its choices."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, request: CompletionRequest, generations: Sequence[Generation], clock: AnswerClock) -> None:
        self.request, self.generations, self.clock = request, generations, clock
        self.token_bytes: dict[int, bytes] = {}
        identity = f"{self.prefix}-{uuid.uuid4().hex}"
        self.base = {"id": identity, "created": int(time.time()), "model": request.model}

    def usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices it has; cached is what its first choice found in the cache."""
        prompts = [generation.stats for generation in self.generations[:: self.request.n]]
        prompt = sum(stats.prompt_tokens for stats in prompts)
        completion = sum(generation.stats.completion_tokens for generation in self.generations)
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
                    self.clock.piece(piece.tokens)
                yield piece
        finally:
            await source.aclose()
            if has_begun:
                usage = self.usage()
                self.clock.finished(usage["prompt_tokens"], usage["completion_tokens"])

    async def whole(self, pieces: AsyncGenerator[Piece]) -> dict[str, Any]:
        """The answer in one object: openapi.ChatCompletion or TextCompletion."""
        texts: list[list[str]] = [[] for _ in self.generations]
        logprobs: list[list[TokenLogprob]] = [[] for _ in self.generations]
        reasons: list[str | None] = [None] * len(self.generations)
        async for piece in pieces:
            texts[piece.choice].append(piece.text)
            logprobs[piece.choice] += piece.logprobs
            reasons[piece.choice] = piece.finish_reason or reasons[piece.choice]
        choices = []
        for index, (text, records, reason) in enumerate(zip(texts, logprobs, reasons, strict=True)):
            choice = {**self._content("".join(text)), "index": index, "finish_reason": reason}
            choices.append({**choice, "logprobs": self._logprobs(records)})
        return {**self.base, "object": self.kind, "choices": choices, "usage": self.usage()}

    async def events(self, first: Piece | None, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
        """Server-sent events; `first` has been taken off `pieces` already."""
        try:
            for delta in self._openings():
                yield self._event(delta)
            if first is not None:
                yield self._piece_event(first)
            async for piece in pieces:
                yield self._piece_event(piece)
        except APIError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            chunk = {**self.base, "object": self.chunk_kind, "choices": [], "usage": self.usage()}
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    def _piece_event(self, piece: Piece) -> str:
        choice = {**self._delta(piece), "index": piece.choice, "finish_reason": piece.finish_reason}
        return self._event({**choice, "logprobs": self._logprobs(piece.logprobs)})

    def _event(self, choice: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.base, 'object': self.chunk_kind, 'choices': [choice]})}\n\n"

    def _text_of(self, token: int) -> str:
        return self.token_bytes[token].decode("utf-8", errors="replace")

    @abc.abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        """The part of a whole answer's choice that holds its text."""

    @abc.abstractmethod
    def _delta(self, piece: Piece) -> dict[str, Any]:
        """The part of an event's choice that holds its text."""

    @abc.abstractmethod
    def _openings(self) -> Iterable[dict[str, Any]]:
        """Choices of the events before the first piece."""

    @abc.abstractmethod
    def _logprobs(self, records: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Log-probabilities as the endpoint shows them; None where none were asked for."""


class ChatAnswer(Answer):
    """chat.completion"""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text} if piece.text else {}}

    def _openings(self) -> Iterable[dict[str, Any]]:
        for index in range(len(self.generations)):
            yield {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def _logprobs(self, records: Sequence[TokenLogprob]) -> dict[str, Any] | None:
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

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

    def _openings(self) -> Iterable[dict[str, Any]]:
        return ()

    def _logprobs(self, records: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.request.top_count is None:
            return None
        texts = [self._text_of(record.token) for record in records]
        return {
            "tokens": texts,
            "token_logprobs": [record.logprob for record in records],
            "top_logprobs": [{self._text_of(token): value for token, value in record.top} for record in records],
            "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
        }
