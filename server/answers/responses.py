"""Answers of /v1/responses, whole or as its typed events."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from ...runtime.call_reader import Argued, Called, Event, Said
from ..models.metrics import AnswerClock
from ..models.worker import Piece
from ..schemas.error import APIError
from ..schemas.responses import ResponsesRequest
from .answer import ChatAnswer
from .choices import Choice

Item = dict[str, Any]


class ResponsesAnswer(ChatAnswer):
    """response"""

    prefix = "resp"

    def __init__(self, asked: ResponsesRequest, choices: Sequence[Choice], clock: AnswerClock) -> None:
        super().__init__(asked.as_chat(), choices, clock)
        self._asked = asked
        self._output: list[Item] = []
        self._reason: str | None = None
        self._number = 0

    async def whole(self, pieces: AsyncGenerator[Piece]) -> dict[str, Any]:
        """The answer in one object."""
        async for piece in pieces:
            for _ in self._piece(piece):
                pass
        return self._response("completed")

    async def events(self, first: Piece | None, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
        """Server-sent events; `first` has been taken off `pieces` already."""
        for kind in ("response.created", "response.in_progress"):
            yield self._written({"type": kind, "response": self._response("in_progress")})
        try:
            for event in self._piece(first) if first is not None else ():
                yield self._written(event)
            async for piece in pieces:
                for event in self._piece(piece):
                    yield self._written(event)
        except APIError as error:
            detail = error.body["error"]
            yield self._written({"type": "error", "message": detail["message"], "code": detail["code"], "param": None})
            return
        response = self._response("completed")
        yield self._written({"type": f"response.{response['status']}", "response": response})

    def _written(self, event: dict[str, Any]) -> str:
        self._number += 1
        return f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': self._number - 1})}\n\n"

    def _piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Take in a piece; the events that tell of it."""
        for event in self.read(piece):
            yield from self._event_of(event)
        if piece.finish_reason:
            self._reason = piece.finish_reason
            yield from self._close()

    def _event_of(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Called):
            yield from self._close()
            identity = {"id": f"fc_{uuid.uuid4().hex}", "call_id": f"call_{uuid.uuid4().hex[:24]}"}
            yield self._open({"type": "function_call", **identity, "name": event.name, "arguments": ""})
        elif isinstance(event, Argued):
            self._output[-1]["arguments"] += event.text
            yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": event.text}
        elif isinstance(event, Said):
            if not self._output or self._output[-1]["type"] != "message":
                if not event.text.strip():  # what stands between calls
                    return
                yield self._open(
                    {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "content": []}
                )
                self._output[-1]["content"].append(
                    {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                )
                yield {"type": "response.content_part.added", **self._place(0), "part": dict(self._part)}
            self._part["text"] += event.text
            yield {"type": "response.output_text.delta", **self._place(0), "delta": event.text, "logprobs": []}

    @property
    def _part(self) -> dict[str, Any]:
        return self._output[-1]["content"][0]

    def _open(self, item: Item) -> dict[str, Any]:
        self._output.append({**item, "status": "in_progress"})
        index = len(self._output) - 1
        return {"type": "response.output_item.added", "output_index": index, "item": dict(self._output[-1])}

    def _close(self) -> Iterator[dict[str, Any]]:
        """Events of the end of the item in progress."""
        if not self._output or self._output[-1]["status"] != "in_progress":
            return
        item = self._output[-1]
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        if item["type"] == "message":
            text = {"text": self._part["text"], "logprobs": []}
            yield {"type": "response.output_text.done", **self._place(0), **text}
            yield {"type": "response.content_part.done", **self._place(0), "part": dict(self._part)}
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield {"type": "response.function_call_arguments.done", **self._place(), **done}
        yield {"type": "response.output_item.done", "output_index": len(self._output) - 1, "item": item}

    def _place(self, content_index: int | None = None) -> dict[str, Any]:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return place if content_index is None else {**place, "content_index": content_index}

    def _response(self, status: str) -> dict[str, Any]:
        is_cut = self._reason == "length"
        usage = self.usage()
        asked = self._asked.model_dump(by_alias=True, include=set(ECHOED))
        return {
            "id": self.base["id"],
            "object": "response",
            "created_at": self.base["created"],
            "model": self.base["model"],
            "status": "incomplete" if is_cut else status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "error": None,
            "output": self._output,
            **asked,
            "metadata": {},
            "previous_response_id": None,
            "store": False,
            "usage": None
            if status == "in_progress"
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }


ECHOED = (
    *("instructions", "max_output_tokens", "parallel_tool_calls", "temperature", "top_p", "truncation"),
    *("tools", "tool_choice", "text"),
)
"""Fields of the request that the answer repeats."""
