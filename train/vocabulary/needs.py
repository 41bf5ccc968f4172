"""Which tokens a model cannot do without: those of its tokenizer, of its settings and of its chat template."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...runtime.base.errors import UsageError
from ..data.chat import ChatFormat
from ..data.encoding import end_of_text_id, tokenize
from .pieces import Pieces, read_pieces
from .rewriting import named_tokens

CONTENT = "?"
"""Stands for what is said in a chat."""


def tokenizer_data(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The contents of a tokenizer's tokenizer.json."""
    backend: Any = tokenizer.backend_tokenizer
    return json.loads(backend.to_str())


def pieces_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The tokens of a model; ModelError where its tokenizer is of a kind whose tokens cannot go."""
    pieces = read_pieces(tokenizer_data(tokenizer), int(model.config.vocab_size))
    named = named_tokens(model.config) | named_tokens(model.generation_config)
    fixed = pieces.fixed | named | template_tokens(tokenizer) | {end_of_text_id(tokenizer)}
    return replace(pieces, fixed=frozenset(fixed))


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that the chat template writes around what is said; none without one that writes a plain chat."""
    chat = ChatFormat.of_tokenizer(tokenizer)
    if chat is None:
        return set()
    turns = [{"role": role, "content": CONTENT} for role in ("system", "user", "assistant", "user")]
    texts = [chat.prompt(turns[1:2])]
    try:
        texts.append(chat.prompt(turns))
    except UsageError:  # some know no system
        texts.append(chat.prompt(turns[1:]))
    return {index for ids in tokenize(tokenizer, texts) for index in ids}
