"""The OpenAPI document: what FastAPI derives, with this server's models and errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "the request is wrong",
        401: "the key is wrong",
        404: "no such model",
        408: "the answer took too long",
        413: "the body is too large",
        429: "the queue is full",
        503: "the model does not fit",
    }.items()
}
"""Statuses other than 200, each with OpenAI's error body."""


def document(app: FastAPI, models: Iterable[str]) -> None:
    """Name the served models in the document and drop FastAPI's 422: wrong requests are answered with 400."""
    derive = app.openapi

    def openapi() -> dict[str, Any]:
        schema = derive()
        for request in ("ChatRequest", "TextRequest"):
            schema["components"]["schemas"][request]["properties"]["model"] = {"type": "string", "enum": list(models)}
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
