"""From documents to full token sequences: shuffling, tokenising, packing, mixing, and resuming exactly.

The stream is one global sequence of packed windows, a function of the seed alone, whatever the number of ranks that
share it. Documents are shuffled within blocks, windows come from many documents at once (see lanes.py), and sources are
mixed window by window: the one furthest behind its share is next.

Windows that come from many documents at once, whatever the documents' lengths.

A lane packs documents end to end and is read window by window. A source keeps many lanes and visits all of them, in a
new random order each time, before any comes again: neighbouring windows come from as many documents as there are
lanes. Long documents that lanes begin with are begun at a random place (and their beginnings read after their ends):
else the first windows of a run would all be beginnings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...runtime.base.errors import DataError
from .chat import Chat, Document, Encoder
from .documents import DataSpec, is_held_out, open_documents

LANES = 64
"""Documents of a source that are read side by side."""

ORDER, START = 1_000_001, 1_000_002
"""What random numbers are for; larger than any number of epochs, which seeds the order of documents."""


class Lanes:
    """Endless windows [S + 1] of one source, a function of the seed alone."""

    def __init__(self, next_document: Callable[[], np.ndarray], count: int, window: int, seed: tuple[int, ...]) -> None:
        """`next_document` gives token ids int32 [n], its end-of-text token among them; n > 0. `window`: S."""
        self._next_document = next_document
        self._seed = seed
        self.window = window
        self.buffers = [np.empty(0, np.int32)] * count
        """What each lane holds of its documents and has not given yet."""
        self.drawn = 0
        """Windows given so far."""

    def next_window(self) -> np.ndarray:
        """int32 [S + 1]; its last token is the first of the lane's next window, so each token is predicted once."""
        visit, turn = divmod(self.drawn, len(self.buffers))
        lane = int(self._order(visit)[turn])
        parts, size = [self.buffers[lane]], len(self.buffers[lane])
        while size <= self.window:
            document = self._next_document()
            if not visit and not size and len(document) > self.window:
                document = np.roll(document, self._random(START, lane).integers(len(document)))
            parts.append(document)
            size += len(document)
        tokens = np.concatenate(parts)
        self.buffers[lane] = tokens[self.window :]
        self.drawn += 1
        return tokens[: self.window + 1]

    def _order(self, visit: int) -> np.ndarray:
        return self._random(ORDER, visit).permutation(len(self.buffers))

    def _random(self, *what: int) -> np.random.Generator:
        """Numbers that depend on the seed and on what they are for, not on those drawn before."""
        return np.random.default_rng([*self._seed, *what])

    def state(self) -> dict[str, Any]:
        """Cheap: arrays are shared, and none is ever changed."""
        return {"buffers": list(self.buffers), "drawn": self.drawn}

    def load_state(self, state: dict[str, Any]) -> None:
        self.buffers, self.drawn = list(state["buffers"]), state["drawn"]


SHUFFLE_BLOCK = 8192
"""Documents shuffled together; also what a resumed run reads again at most."""
TOKENIZE_BATCH = 32
"""Documents tokenised in one call (in parallel inside tokenizers)."""


@dataclass
class SourceState:
    """Position in one corpus."""

    epoch: int = 0
    block: int = 0
    """Blocks of this epoch that are used up."""
    offset: int = 0
    """Documents of the current block that are used up."""


class DocumentSource:
    """Endless shuffled documents of one corpus; held-out ones are left out."""

    def __init__(self, spec: DataSpec, held_out_fraction: float, seed: int, index: int) -> None:
        self.spec = spec
        self.held_out_fraction = held_out_fraction
        self.seed = (seed, index)
        self.state = SourceState()
        self._blocks: Iterator[list[Document]] | None = None
        self._current: list[Document] = []
        self._first_block_size = 0

    def first_block_size(self) -> int:
        """Documents in the first block: all, of a corpus that is no larger."""
        if self._blocks is None:
            self._open()
        return self._first_block_size

    def go_to(self, state: SourceState) -> None:
        """Continue from another position."""
        self.state, self._blocks = state, None

    def next_documents(self, count: int) -> list[Document]:
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
        documents = (each for each in open_documents(self.spec) if not is_held_out(each, self.held_out_fraction))
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
        self._first_block_size = self._first_block_size or len(block)
        return None

    def _next_block(self) -> None:
        self.state.block += 1
        self.state.offset = 0
        self._load_block()


class TokenSource:
    """Windows of one corpus."""

    def __init__(self, documents: DocumentSource, encoder: Encoder, window: int) -> None:
        self.documents = documents
        self.encoder = encoder
        self._queue: list[np.ndarray] = []
        """Documents that are tokenised and in no lane yet."""
        self._window = window
        self._lanes: Lanes | None = None

    @property
    def lanes(self) -> Lanes:
        """Made on first use: their number depends on how many documents there are."""
        if self._lanes is None:
            # two documents a lane at least, so that a small corpus is read through before anything of it comes again
            count = max(1, min(LANES, self.documents.first_block_size() // 2))
            self._lanes = Lanes(self._next_document, count, self._window, self.documents.seed)
        return self._lanes

    def next_window(self) -> np.ndarray:
        """int32 [window + 1]"""
        return self.lanes.next_window()

    def _next_document(self) -> np.ndarray:
        if not self._queue:
            self._queue = self.encoder.encode(self.documents.next_documents(TOKENIZE_BATCH))
        return self._queue.pop(0)

    def begin_anew(self, encoder: Encoder) -> None:
        """Read the documents that are in no lane yet with another encoder; the rest of those in lanes is not read."""
        count = len(self.lanes.buffers)
        self.encoder = encoder
        self.documents.state.offset -= len(self._queue)  # they are the last ones taken, all of the block at hand
        self._queue = []
        self._lanes = Lanes(self._next_document, count, self._window, self.documents.seed)

    def state(self) -> dict[str, Any]:
        return {"documents": vars(self.documents.state).copy(), "queue": list(self._queue), "lanes": self.lanes.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.documents.go_to(SourceState(**state["documents"]))
        self._queue = list(state["queue"])
        self._lanes = Lanes(self._next_document, len(state["lanes"]["buffers"]), self._window, self.documents.seed)
        self._lanes.load_state(state["lanes"])


class PackedStream:
    """The global sequence of windows [sequence_length + 1] of one or more corpora."""

    def __init__(
        self,
        specs: Sequence[DataSpec],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        held_out_fraction: float,
        seed: int,
    ) -> None:
        documents = [DocumentSource(spec, held_out_fraction, seed, index) for index, spec in enumerate(specs)]
        self.encoder = Encoder(tokenizer)
        self.sources = [TokenSource(source, self.encoder, sequence_length) for source in documents]
        self.sequence_length = sequence_length
        self.has_chats = False
        """Whether any corpus begins with chats; known after `check`."""

    def check(self) -> None:
        """DataError where a corpus has not even one sequence to train on, or nothing in it to be learned; leaves the
        position unchanged."""
        for source in (source.documents for source in self.sources):
            tokens = learned = 0
            for document in open_documents(source.spec):
                self.has_chats |= isinstance(document, Chat)
                if not is_held_out(document, source.held_out_fraction):
                    ids = self.encoder.encode([document])[0]
                    tokens, learned = tokens + len(ids), learned + int((ids >= 0).sum())
                if tokens > self.sequence_length and learned:
                    break
            else:
                if tokens > self.sequence_length:
                    raise DataError(f"--data {source.spec.path}: its chats hold no answer to learn")
                raise DataError(
                    f"--data {source.spec.path}: {tokens} tokens to train on, less than one sequence of "
                    f"{self.sequence_length}; give more text or a smaller --sequence-length"
                )

    def next_windows(self, count: int) -> np.ndarray:
        """The next `count` windows, int64 [count, sequence_length + 1]; ~token where it is only read (see encoding)."""
        return np.stack([self._next_source().next_window() for _ in range(count)]).astype(np.int64)

    def _next_source(self) -> TokenSource:
        """The one furthest behind its share: after every window, each is within one of its share."""

        def progress(source: TokenSource) -> float:
            return (source.lanes.drawn + 0.5) / source.documents.spec.weight

        return min(self.sources, key=progress)

    def read_on_with(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Go on with the documents that come next, read with another tokenizer. Those that are begun are left: their
        rest, text from amid a word perhaps, has no tokens that this tokenizer would give it."""
        self.encoder = Encoder(tokenizer)
        for source in self.sources:
            source.begin_anew(self.encoder)

    def state(self) -> list[dict[str, Any]]:
        """Where every source stands: JSON values and int32 arrays. Cheap enough to be taken at every step."""
        return [source.state() for source in self.sources]

    def load_state(self, state: list[dict[str, Any]]) -> None:
        """Go on from a `state` of a stream of the same settings."""
        if len(state) != len(self.sources):
            raise DataError(f"the checkpoint was written with {len(state)} --data sources, not {len(self.sources)}")
        for source, values in zip(self.sources, state, strict=True):
            source.load_state(values)


def held_out_windows(
    specs: Sequence[DataSpec],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    held_out_fraction: float,
    max_tokens: int,
) -> np.ndarray:
    """Held-out windows, int64 [n, sequence_length + 1], about max_tokens in all, the same for every seed.

    Each corpus gives an equal share, from as many of its held-out documents as the share has windows: the first window
    of each document comes before the second of any.
    """
    windows = []
    encoder = Encoder(tokenizer)
    for spec in specs:
        wanted = max(1, max_tokens // len(specs) // sequence_length)
        found = _spread_windows(_held_out_ids(spec, encoder, held_out_fraction), sequence_length, wanted)
        if not found:
            held_out = sum(map(len, _held_out_ids(spec, encoder, held_out_fraction)))
            raise DataError(
                f"--data {spec.path}: its held-out part has {held_out} tokens, less than one sequence of "
                f"{sequence_length}; give more text, a larger --held-out-fraction or a smaller --sequence-length"
            )
        windows += found
    stacked = np.stack(windows).astype(np.int64)
    if not (stacked[:, 1:] >= 0).any():
        raise DataError(
            f"the held-out windows of {sequence_length} tokens hold no answer's token to predict; give more "
            "--eval-tokens or a longer --sequence-length"
        )
    return stacked


def _held_out_ids(spec: DataSpec, encoder: Encoder, held_out_fraction: float) -> Iterator[list[int]]:
    for document in open_documents(spec):
        if is_held_out(document, held_out_fraction):
            yield encoder.encode([document])[0].tolist()


def _spread_windows(documents: Iterator[list[int]], sequence_length: int, wanted: int) -> list[np.ndarray]:
    """Up to `wanted` windows; short documents are packed together, long ones give one window before a second."""
    packs: list[np.ndarray] = []
    pack: list[int] = []
    for ids in documents:
        pack += ids
        if len(pack) > sequence_length:
            packs.append(np.asarray(pack))
            pack = []
        if len(packs) == wanted:
            break
    windows: list[np.ndarray] = []
    start = 0
    while len(windows) < wanted and any(len(each) > start + sequence_length for each in packs):
        windows += [each[start : start + sequence_length + 1] for each in packs if len(each) > start + sequence_length]
        start += sequence_length
    return windows[:wanted]
