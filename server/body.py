"""Parse and validate request bodies in threads, so that a large body does not stop the answers of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from .access.guard import BODY
from .models.worker import run_in_thread
from .schemas.api_error import APIError, unreadable_message, validation_message


class BodyRoute(APIRoute):
    """A route whose endpoint gets the body as its argument `request`, and the request as its second one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        model: type[BaseModel] | None = get_type_hints(self.endpoint).get("request")
        if model is None:
            return super().get_route_handler()

        async def handle(http: Request) -> Response:
            request = await run_in_thread(lambda: read_body(model, http.scope[BODY]))
            return await self.endpoint(request, http)

        return handle


def read_body(model: type[BaseModel], body: bytes) -> BaseModel:
    """Return `body` as a `model`. Raise APIError 400 with one line that names the field if it is wrong."""
    try:
        return model.model_validate(json.loads(body))
    except ValidationError as error:
        raise APIError(400, validation_message(error.errors(include_url=False, include_input=False))) from error
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
        raise APIError(400, f"the body is not JSON: {reason}" if body else "the body is not a JSON object") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits
        raise APIError(400, unreadable_message(error)) from error
