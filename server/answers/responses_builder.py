"""Build answers of POST /v1/responses, whole or as typed events."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from ...runtime.call_reader import ArgumentsEvent, CallEvent, Event, TextEvent
from ..models.worker import Piece
from ..schemas.api_error import APIError
from ..schemas.response_models import ItemStatus, OutputCall, OutputMessage, OutputText, ResponseAnswer, ResponseUsage
from ..schemas.responses_api import ResponsesRequest
from .builders import ChatBuilder, with_first
from .choices import Choice

REPEATED = ResponsesRequest.model_fields.keys() & ResponseAnswer.model_fields.keys()
"""Fields of the request that the answer repeats."""


class ResponsesBuilder(ChatBuilder):
    """Builds a response, which is the only choice of a chat as a list of items: one for each text and call."""

    id_prefix = "resp_"

    def __init__(self, request: ResponsesRequest, choices: Sequence[Choice], began: float) -> None:
        super().__init__(request.translation, choices, began)
        self._repeated: dict[str, Any] = request.model_dump(by_alias=True, include=set(REPEATED))
        self._output: list[OutputMessage | OutputCall] = []
        self._reason: str | None = None
        self._num_events = 0

    async def whole(self, pieces: AsyncGenerator[Piece]) -> ResponseAnswer:
        """Return the answer in one object, after the last piece."""
        async for piece in pieces:
            for _ in self._piece_events(piece):
                pass
        return self._response("completed")

    async def events(self, first: Piece | None, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
        """Yield server-sent events of `first` and of the rest of `pieces`."""
        for kind in ("response.created", "response.in_progress"):
            yield self._written({"type": kind, "response": self._response("in_progress").model_dump()})
        try:
            async for piece in with_first(first, pieces):
                if piece.is_ping:
                    yield self.ping
                for event in self._piece_events(piece):
                    yield self._written(event)
        except APIError as error:
            detail = error.body["error"]
            yield self._written({"type": "error", "message": detail["message"], "code": detail["code"], "param": None})
            return
        response = self._response("completed")
        yield self._written({"type": f"response.{response.status}", "response": response.model_dump()})

    def _written(self, event: dict[str, Any]) -> str:
        numbered = {**event, "sequence_number": self._num_events}
        self._num_events += 1
        return f"event: {event['type']}\ndata: {json.dumps(numbered)}\n\n"

    def _piece_events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Add a piece to the output and yield its events."""
        for event in self.read(piece):
            yield from self._events_of(event)
        if piece.finish_reason:
            self._reason = piece.finish_reason
            yield from self._close()

    def _events_of(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, CallEvent):
            # items follow each other: an item ends where the next one begins
            yield from self._close()
            item_id, call_id = f"fc_{uuid.uuid4().hex}", f"call_{uuid.uuid4().hex[:24]}"
            yield self._open(OutputCall(id=item_id, call_id=call_id, name=event.name))
        elif isinstance(event, ArgumentsEvent):
            call = self._output[-1]
            assert isinstance(call, OutputCall)
            call.arguments += event.text
            yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": event.text}
        elif isinstance(event, TextEvent):
            message = self._output[-1] if self._output else None
            if not isinstance(message, OutputMessage):
                if not event.text.strip():  # white space between calls
                    return
                message = OutputMessage(id=f"msg_{uuid.uuid4().hex}")
                yield self._open(message)
                message.content.append(OutputText())
                yield {"type": "response.content_part.added", **self._place(0), "part": OutputText().model_dump()}
            message.content[0].text += event.text
            yield {"type": "response.output_text.delta", **self._place(0), "delta": event.text, "logprobs": []}

    def _open(self, item: OutputMessage | OutputCall) -> dict[str, Any]:
        """Begin `item` and return its event."""
        self._output.append(item)
        index = len(self._output) - 1
        return {"type": "response.output_item.added", "output_index": index, "item": item.model_dump()}

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the item in progress, if there is one, and yield its events."""
        if not self._output or self._output[-1].status != "in_progress":
            return
        item = self._output[-1]
        item.status = "incomplete" if self._reason == "length" else "completed"
        if isinstance(item, OutputMessage):
            (part,) = item.content
            yield {"type": "response.output_text.done", **self._place(0), "text": part.text, "logprobs": []}
            yield {"type": "response.content_part.done", **self._place(0), "part": part.model_dump()}
        else:
            done = {"arguments": item.arguments, "name": item.name}
            yield {"type": "response.function_call_arguments.done", **self._place(), **done}
        index = len(self._output) - 1
        yield {"type": "response.output_item.done", "output_index": index, "item": item.model_dump()}

    def _place(self, content_index: int | None = None) -> dict[str, Any]:
        """Return the fields that tell which item an event is about."""
        place = {"item_id": self._output[-1].id, "output_index": len(self._output) - 1}
        return place if content_index is None else {**place, "content_index": content_index}

    def _response(self, status: ItemStatus) -> ResponseAnswer:
        is_cut = self._reason == "length"
        return ResponseAnswer(
            **self._repeated,
            id=self.base["id"],
            created_at=self.base["created"],
            status="incomplete" if is_cut else status,
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            output=self._output,
            usage=None if status == "in_progress" else self._usage(),
        )

    def _usage(self) -> ResponseUsage:
        usage = self.usage()
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=usage.prompt_tokens_details,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )
