"""Texts as vectors, by the states of a model that was made to write."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np

from ...runtime.base.errors import ContextOverflowError, EfficientLLMError
from ...runtime.engines.scheduler import EngineScheduler
from ...runtime.prompt import text_prompt
from ..schemas.embeddings import EmbeddingsRequest
from ..schemas.error import APIError


async def embeddings_of(engine: EngineScheduler, request: EmbeddingsRequest) -> dict[str, Any]:
    """The answer in one object; APIError 400 for a text that is empty or too long."""
    vectors, num_tokens = [], 0
    for text in request.texts:
        vector, tokens = await asyncio.to_thread(_embedded, engine, text, request)
        vectors.append(vector)
        num_tokens += tokens
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "model": request.model, "data": data, "usage": usage}


def _embedded(engine: EngineScheduler, text: str | list[int], request: EmbeddingsRequest) -> tuple[np.ndarray, int]:
    """(vector, tokens) of one text"""
    try:
        tokens = text_prompt(engine, text) if isinstance(text, str) else text
        if not text or not tokens or max(tokens) >= engine.vocab_size:
            raise APIError(400, f"input: tokens are 0 to {engine.vocab_size - 1}, and at least one")
        return engine.embed(tokens, request.pooling), len(tokens)
    except ContextOverflowError as error:
        raise APIError(400, f"input: {error}", code="context_length_exceeded") from error
    except EfficientLLMError as error:
        raise APIError(400, f"input: {error}") from error


def _encoded(vector: np.ndarray, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
