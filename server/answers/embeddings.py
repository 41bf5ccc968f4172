"""Embeddings of texts: hidden states of a language model, pooled to one vector."""

from __future__ import annotations

import asyncio
import base64

import numpy as np

from ...runtime.base.errors import ContextOverflowError, EfficientLLMError
from ...runtime.engines.scheduler import EngineScheduler
from ..schemas.api_error import APIError, context_error
from ..schemas.completions import AnyPrompt, EmbeddingsRequest
from ..schemas.response_models import Embedding, Embeddings, EmbeddingsUsage
from .choices import tokens_of


async def embed_texts(engine: EngineScheduler, request: EmbeddingsRequest) -> Embeddings:
    """Return the embeddings of all texts of a request. APIError 400 for a text that is empty or too long."""
    data, num_tokens = [], 0
    # one after the other, so that a request whose client is gone ends with the current text
    for index, text in enumerate(request.texts):
        vector, num_text_tokens = await asyncio.to_thread(_embed, engine, text, request)
        data.append(Embedding(index=index, embedding=_encode(vector, request.encoding_format)))
        num_tokens += num_text_tokens
    usage = EmbeddingsUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return Embeddings(model=request.model, data=data, usage=usage)


def _embed(engine: EngineScheduler, text: AnyPrompt, request: EmbeddingsRequest) -> tuple[np.ndarray, int]:
    """Return the vector of one text, [hidden_size], and the number of its tokens."""
    tokens = tokens_of(engine, text, "input")
    tokens = tokens[: engine.context_length] if request.truncate else tokens
    try:
        return engine.embed(tokens, request.pooling), len(tokens)
    except ContextOverflowError as error:
        raise context_error(f"input: is too large: {error}", len(tokens), engine.context_length) from error
    except EfficientLLMError as error:
        raise APIError(400, f"input: {error}") from error


def _encode(vector: np.ndarray, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
