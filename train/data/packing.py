"""From documents to full token sequences: mixing, shuffling, tokenising, packing, and resuming exactly.

The stream is one global sequence of packed windows, a function of the seed alone. Documents are shuffled within blocks,
sources are mixed by tokens (the one furthest behind its share is next), and every window has
sequence_length + 1 tokens, so that consecutive windows overlap by one and every token is predicted once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...runtime.base.errors import DataError
from .documents import DataSpec, is_held_out, open_documents

SHUFFLE_BLOCK = 8192
"""Documents shuffled together; also what a resumed run reads again at most."""
TOKENIZE_BATCH = 32
"""Documents tokenised in one call (in parallel inside tokenizers)."""

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


@dataclass
class SourceState:
    """Position in one corpus."""

    epoch: int = 0
    block: int = 0
    """Blocks of this epoch that are used up."""
    offset: int = 0
    """Documents of the current block that are used up."""
    tokens: int = 0
    """Tokens taken so far, over all epochs."""


class DocumentSource:
    """Endless shuffled documents of one corpus; held-out ones are left out."""

    def __init__(self, spec: DataSpec, held_out_fraction: float, seed: int, index: int) -> None:
        self.spec = spec
        self.held_out_fraction = held_out_fraction
        self.seed = (seed, index)
        self.state = SourceState()
        self._blocks: Iterator[list[str]] | None = None
        self._current: list[str] = []

    def next_documents(self, count: int) -> list[str]:
        """Up to `count` documents, all from one block."""
        if self._blocks is None:
            self._open()
        if self.state.offset >= len(self._current):
            self._next_block()
        start = self.state.offset
        taken = self._current[start : start + count]
        self.state.offset = start + len(taken)
        return taken

    def _open(self) -> None:
        """Open the corpus at the position of `state`."""
        documents = (text for text in open_documents(self.spec) if not is_held_out(text, self.held_out_fraction))
        documents = itertools.islice(documents, self.state.block * SHUFFLE_BLOCK, None)
        self._blocks = (list(block) for block in iter(lambda: list(itertools.islice(documents, SHUFFLE_BLOCK)), []))
        self._load_block()

    def _load_block(self) -> None:
        assert self._blocks is not None
        block = next(self._blocks, None)
        if block is None:
            if self.state.block == 0:
                raise DataError(f"--data {self.spec.path}: no documents to train on")
            self.state.epoch, self.state.block, self.state.offset = self.state.epoch + 1, 0, 0
            return self._open()
        order = np.random.default_rng([*self.seed, self.state.epoch, self.state.block]).permutation(len(block))
        self._current = [block[i] for i in order]
        return None

    def _next_block(self) -> None:
        self.state.block += 1
        self.state.offset = 0
        self._load_block()


class PackedStream:
    """The global sequence of packed windows [sequence_length + 1] of one or more corpora."""

    def __init__(
        self,
        specs: Sequence[DataSpec],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        held_out_fraction: float,
        seed: int,
    ) -> None:
        self.sources = [DocumentSource(spec, held_out_fraction, seed, index) for index, spec in enumerate(specs)]
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.separator = end_of_text_id(tokenizer)
        self._buffer: list[int] = []

    def check(self) -> None:
        """DataError where a corpus has not even one sequence to train on; leaves the position unchanged."""
        for source in self.sources:
            tokens = 0
            for text in open_documents(source.spec):
                if not is_held_out(text, source.held_out_fraction):
                    tokens += len(tokenize(self.tokenizer, [text])[0]) + 1
                if tokens > self.sequence_length:
                    break
            else:
                raise DataError(
                    f"--data {source.spec.path}: {tokens} tokens to train on, less than one sequence of "
                    f"{self.sequence_length}; give more text or a smaller --sequence-length"
                )

    def next_windows(self, count: int) -> np.ndarray:
        """The next `count` windows, int64 [count, sequence_length + 1]."""
        needed = count * self.sequence_length + 1
        while len(self._buffer) < needed:
            self._fill()
        tokens = np.asarray(self._buffer[:needed], dtype=np.int64)
        del self._buffer[: needed - 1]
        starts = np.arange(count)[:, None] * self.sequence_length
        return tokens[starts + np.arange(self.sequence_length + 1)]

    def _fill(self) -> None:
        source = min(self.sources, key=lambda source: source.state.tokens / source.spec.weight)
        for ids in tokenize(self.tokenizer, source.next_documents(TOKENIZE_BATCH)):
            self._buffer += [*ids, self.separator]
            source.state.tokens += len(ids) + 1

    def state_dict(self) -> dict[str, Any]:
        return {"sources": [vars(source.state).copy() for source in self.sources], "leftover": list(self._buffer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["sources"]) != len(self.sources):
            raise DataError(
                f"the checkpoint was written with {len(state['sources'])} --data sources, not {len(self.sources)}"
            )
        for source, values in zip(self.sources, state["sources"], strict=True):
            source.state = SourceState(**values)
            source._blocks = None
        self._buffer = list(state["leftover"])


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    backend: Any = tokenizer.backend_tokenizer
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def held_out_windows(
    specs: Sequence[DataSpec],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    held_out_fraction: float,
    max_tokens: int,
) -> np.ndarray:
    """Packed held-out windows, int64 [n, sequence_length + 1], about max_tokens in all, the same for every seed.

    Each corpus gives an equal share, in its own order.
    """
    separator = end_of_text_id(tokenizer)
    windows = []
    for spec in specs:
        needed = max(1, max_tokens // len(specs) // sequence_length) * sequence_length + 1
        ids: list[int] = []
        for text in open_documents(spec):
            if is_held_out(text, held_out_fraction):
                ids += [*tokenize(tokenizer, [text])[0], separator]
            if len(ids) >= needed:
                break
        count = (len(ids) - 1) // sequence_length
        if count < 1:
            raise DataError(
                f"--data {spec.path}: its held-out part has {len(ids)} tokens, less than one sequence of "
                f"{sequence_length}; give more text, a larger --held-out-fraction or a smaller --sequence-length"
            )
        starts = np.arange(min(count, needed // sequence_length))[:, None] * sequence_length
        windows.append(np.asarray(ids, dtype=np.int64)[starts + np.arange(sequence_length + 1)])
    return np.concatenate(windows)
