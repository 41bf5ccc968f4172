"""Requests for embeddings, as OpenAI's clients send them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .completions import Asked, Tokens
from .messages import Text

MAX_INPUTS = 2048
"""OpenAI's own limit."""


class EmbeddingsRequest(Asked):
    """POST /v1/embeddings"""

    model: Text
    input: Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1, max_length=MAX_INPUTS)]
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
