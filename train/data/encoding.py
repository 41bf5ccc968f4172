"""From documents to token ids. A token that is read but not learned, as a user's words, is given as ~token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...runtime.base.errors import DataError
from .chat import Chat, ChatFormat, Document

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""Document separators of the supported families, in order of preference; the EOS token otherwise."""


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's end-of-text token."""
    vocabulary = tokenizer.get_vocab()
    for token in END_OF_TEXT:
        if token in vocabulary:
            return vocabulary[token]
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError("the tokenizer has no end-of-text or EOS token to separate documents with")
    return tokenizer.eos_token_id


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    backend: Any = tokenizer.backend_tokenizer
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


class Encoder:
    """Documents as arrays of ids: text with its end-of-text token, chats as the tokenizer's template writes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.separator = end_of_text_id(tokenizer)
        self.chat = ChatFormat.of_tokenizer(tokenizer)

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """int32 [n] of each; DataError for a chat that the source's template cannot write."""
        texts = iter(tokenize(self.tokenizer, [each for each in documents if isinstance(each, str)]))
        return [
            self._chat(each) if isinstance(each, Chat) else np.asarray([*next(texts), self.separator], np.int32)
            for each in documents
        ]

    def _chat(self, chat: Chat) -> np.ndarray:
        """Answers and the ends of their turns are learned; a chat ends with a turn, not with the end of a text."""
        if self.chat is None:
            raise DataError("the text holds chats (messages), and the source has no chat template to write them with")
        spans = self.chat.spans(chat)
        if not spans:
            raise DataError("a chat has no answer to learn: no message of the role assistant")
        ids = [np.asarray(each, np.int32) for each in tokenize(self.tokenizer, [span.text for span in spans])]
        return np.concatenate([each if span.is_answer else ~each for each, span in zip(ids, spans, strict=True)])
