"""POST /v1/embeddings: texts as vectors, by the states of a model that was made to write."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ..runtime.base.errors import ContextOverflowError
from ..runtime.engines.owned import OwnedEngine
from ..runtime.prompt import text_prompt
from .messages import Text
from .schemas import MAX_PROMPTS, APIError, Asked, Tokens


class EmbeddingsRequest(Asked):
    """POST /v1/embeddings"""

    model: Text
    input: Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    """Of the states of all tokens, their mean or the last one's."""

    @property
    def texts(self) -> list[str | list[int]]:
        """Texts or token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [[token for token in self.input if isinstance(token, int)]]
        return [text for text in self.input if not isinstance(text, int)]


def embeddings_of(engine: OwnedEngine, request: EmbeddingsRequest) -> dict[str, Any]:
    """The answer in one object; APIError 400 for a text that is empty or too long."""
    vectors, num_tokens = [], 0
    for text in request.texts:
        tokens = text_prompt(engine, text) if isinstance(text, str) else text
        if not text or not tokens or max(tokens) >= engine.vocab_size:
            raise APIError(400, f"input: tokens are 0 to {engine.vocab_size - 1}, and at least one")
        try:
            vectors.append(engine.embed(tokens, request.pooling))
        except ContextOverflowError as error:
            raise APIError(400, str(error), code="context_length_exceeded") from error
        num_tokens += len(tokens)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "model": request.model, "data": data, "usage": usage}


def _encoded(vector: np.ndarray, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
