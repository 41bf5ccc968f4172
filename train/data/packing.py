"""Shuffle, tokenise, pack and mix documents into windows of tokens, in an order that can be resumed exactly.

The stream is one global sequence of windows. It depends on the seed alone, not on the number of ranks that share it.
Documents are shuffled within blocks. Corpora are mixed window by window: the corpus with the fewest windows for its
weight gives the next one.

Each corpus is read through many lanes. A lane packs documents end to end and is read window by window. All lanes are
visited in a new random order before any is visited again, so neighbouring windows come from as many documents as there
are lanes, whatever their lengths. A chat that fits a window is never cut. If the next one does not fit the rest of a
window, the longest of the waiting chats that does takes the place, and the next one begins the next window. A rest that
fits none holds tokens that are read and not learned. A window after a chat begins with a document. The first document
of a lane starts at a random place if it is longer than a window. Otherwise the first windows of a run would all be
beginnings of documents.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.base.errors import DataError
from .chat import Chat, Encoder
from .documents import DataSpec, Document, HubPlace, is_held_out, nothing_held_out, open_documents

if TYPE_CHECKING:  # the help of efficientllm-data needs no transformers
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("efficientllm.train")

LANES = 64
"""Documents of a corpus that are read side by side."""

ORDER, START = 1_000_001, 1_000_002
"""Purposes of random numbers. They exceed any number of epochs, which seeds the order of documents."""

SHUFFLE_BLOCK = 8192
"""Documents shuffled together. A run resumes at the start of a block."""

TOKENIZE_BATCH = 32
"""Documents tokenised in one call, in parallel inside tokenizers."""

WAITING = 32
"""Documents of a block that wait at least, so that one of them fills the rest of a window of chats. With 8, a tenth of
the home job's windows of 256 tokens stays empty; with 32, a 25th; with none, a quarter."""


@dataclass
class CorpusPosition:
    """Position in one corpus."""

    epoch: int = 0
    block: int = 0
    """Blocks of this epoch that have been read."""
    offset: int = 0
    """Documents of the current block that have been read."""
    hub: dict[str, Any] = field(default_factory=dict)
    """Place of the current block in a hub dataset (HubPlace), or empty: earlier documents are then read again."""


class ShuffledDocuments:
    """Endless shuffled documents of one corpus, without its held-out part."""

    def __init__(self, spec: DataSpec, held_out_fraction: float, seed: int, index: int) -> None:
        self.spec = spec
        self.held_out_fraction = held_out_fraction
        self.seed = (seed, index)
        self.state = CorpusPosition()
        self._blocks: Iterator[list[Document]] | None = None
        self._place = HubPlace()
        self._current: list[Document] = []

    def block_size(self) -> int:
        """Return the number of documents in the current block, which is all of a small corpus."""
        if self._blocks is None:
            self._open()
        return len(self._current)

    def seek(self, state: CorpusPosition) -> None:
        """Continue from another position."""
        self.state, self._blocks = state, None

    def next_documents(self, count: int) -> list[Document]:
        """Return up to `count` documents, all from one block."""
        if self._blocks is None:
            self._open()
        if self.state.offset >= len(self._current):
            self.state.block += 1
            self.state.offset = 0
            self._load_block()
        start = self.state.offset
        documents = self._current[start : start + count]
        self.state.offset = start + len(documents)
        return documents

    def _open(self) -> None:
        """Open the corpus at the position of `state`."""
        start = self.state.block * SHUFFLE_BLOCK
        self._place = HubPlace(**self.state.hub)
        opened = open_documents(self.spec, place=self._place)
        learned = (each for each in opened if not is_held_out(each, self.held_out_fraction))
        documents = itertools.islice(learned, 0 if self.state.hub else start, None)
        self._blocks = iter(lambda: list(itertools.islice(documents, SHUFFLE_BLOCK)), [])
        self._load_block()

    def _load_block(self) -> None:
        """Shuffle the next block, or the first one of the next epoch at the end."""
        assert self._blocks is not None
        place = vars(self._place).copy()
        block = next(self._blocks, None)
        if block is None:
            if self.state.block == 0:
                raise DataError(f"--data {self.spec.path}: no documents to train on")
            self.state = CorpusPosition(self.state.epoch + 1)
            self._open()
            return
        self.state.hub = place if place["state"] else {}
        # seeded by the place, not by earlier draws: a resumed run shuffles this block alone
        order = np.random.default_rng([*self.seed, self.state.epoch, self.state.block]).permutation(len(block))
        self._current = [block[i] for i in order]


def is_kept_whole(ids: np.ndarray, window: int) -> bool:
    """Return True for the ids of a chat that fits a window, so that no window cuts it."""
    # a cut chat would teach the rest of its answer without its request; longer chats cannot be kept whole
    return len(ids) <= window and is_chat(ids)


def is_chat(ids: np.ndarray) -> bool:
    """Return True for the ids of a document with tokens that are only read."""
    return bool(ids.min() < 0)


class CorpusWindows:
    """Endless windows [S + 1] of one corpus, read from several lanes of documents. They depend on the seed alone."""

    def __init__(self, documents: ShuffledDocuments, encoder: Encoder, window: int) -> None:
        """Read windows of S = `window` tokens and the one after them."""
        self.documents = documents
        self.encoder = encoder
        self.window = window
        self.drawn = 0
        """Number of windows returned."""
        self._buffers: list[np.ndarray] | None = None
        self._queue: list[np.ndarray] = []
        """Tokenised documents that are in no lane yet. A chat that was taken before its turn leaves an empty one."""
        self._has_warned = False

    @property
    def buffers(self) -> list[np.ndarray]:
        """Return the tokens of each lane that no window has used, int32. The first call sets the number of lanes."""
        if self._buffers is None:
            # at least two documents a lane, so that a small corpus is read completely before any of it is repeated
            num_lanes = max(1, min(LANES, self.documents.block_size() // 2))
            self._buffers = [np.empty(0, np.int32)] * num_lanes
        return self._buffers

    def next_window(self) -> np.ndarray:
        """Return a window, int32 [S + 1].

        Its last token is the first of the lane's next window, so every token is predicted once. After a chat, the next
        window begins with a document instead, as prompts do, because attention depends on the first token.
        """
        visit, turn = divmod(self.drawn, len(self.buffers))
        lane = int(self._random(ORDER, visit).permutation(len(self.buffers))[turn])
        parts, size = [self.buffers[lane]], len(self.buffers[lane])
        while size <= self.window:
            document = self._next_document()
            room = self.window + 1 - size
            would_be_cut = size and room < len(document)
            if would_be_cut and is_kept_whole(document, self.window):
                self._queue.insert(0, document)  # the next window takes it
                document = self._filling(room)
            is_first_of_lane = not visit and not size
            if is_first_of_lane and len(document) > self.window:
                # rolled, not cut: the beginning follows the end, so that every token is still read
                start = self._random(START, lane).integers(len(document))
                document = np.roll(document, start)
            parts.append(document)
            size += len(document)
        tokens = np.concatenate(parts)
        rest = tokens[self.window :]
        self.buffers[lane] = rest[:0] if len(rest) == 1 and is_chat(parts[-1]) else rest
        self.drawn += 1
        return tokens[: self.window + 1]

    def _filling(self, room: int) -> np.ndarray:
        """Return the longest waiting chat of at most `room` tokens, or `room` tokens that are read and not learned."""
        fitting = [place for place, each in enumerate(self._queue) if 0 < len(each) <= room and is_chat(each)]
        if not fitting:
            return np.full(room, ~np.int32(self.encoder.separator), np.int32)
        place = max(fitting, key=lambda each: len(self._queue[each]))
        chat = self._queue[place]
        self._queue[place] = chat[:0]
        return chat

    def _next_document(self) -> np.ndarray:
        """Return the tokens of the next document, int32 [n]."""
        document = np.empty(0, np.int32)
        while not len(document):
            # not across blocks: `switch_encoder` reads the queue again from the current one
            is_of_block = self.documents.state.offset < self.documents.block_size()
            if not self._queue or (len(self._queue) < WAITING and is_of_block):
                self._queue = self._queue + self.encoder.encode(self.documents.next_documents(TOKENIZE_BATCH))
            document = self._queue.pop(0)
        if len(document) > self.window and not self._has_warned and is_chat(document):
            self._has_warned = True
            _log.warning(
                f"{self.documents.spec.path}: a chat has {len(document)} tokens, and windows of --sequence-length "
                f"{self.window} cut it; efficientllm-data check counts such chats"
            )
        return document

    def _random(self, *purpose: int) -> np.random.Generator:
        """Return a generator that depends on the seed and the purpose, not on numbers drawn before."""
        return np.random.default_rng([*self.documents.seed, *purpose])

    def switch_encoder(self, encoder: Encoder) -> None:
        """Continue with another encoder and empty lanes. The rest of the documents in lanes is dropped."""
        self.encoder = encoder
        # documents in the queue are the last ones taken, all from the current block, and are read again, with the few
        # chats between them that were taken before their turn
        self.documents.state.offset -= len(self._queue)
        self._queue = []
        self._buffers, self.drawn = [np.empty(0, np.int32)] * len(self.buffers), 0

    def state(self) -> dict[str, Any]:
        """Return the position. This is cheap: the arrays are shared, and none is ever modified."""
        lanes = {"buffers": list(self.buffers), "drawn": self.drawn}
        return {"documents": vars(self.documents.state).copy(), "queue": list(self._queue), "lanes": lanes}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state` of windows with the same settings."""
        self.documents.seek(CorpusPosition(**state["documents"]))
        self._queue = list(state["queue"])
        self._buffers, self.drawn = list(state["lanes"]["buffers"]), state["lanes"]["drawn"]


class PackedStream:
    """The global sequence of windows [S + 1] of one or more corpora, with S = `sequence_length`."""

    def __init__(
        self,
        specs: Sequence[DataSpec],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        held_out_fraction: float,
        seed: int,
    ) -> None:
        self.encoder = Encoder(tokenizer)
        documents = [ShuffledDocuments(spec, held_out_fraction, seed, index) for index, spec in enumerate(specs)]
        self.corpora = [CorpusWindows(each, self.encoder, sequence_length) for each in documents]
        self.sequence_length = sequence_length
        self.has_chats = False
        """True if the part of a corpus that `check` read contains a chat."""

    def check(self) -> None:
        """Check that each corpus has a window to train on and a token to learn, without moving the position.

        Raises DataError.
        """
        for documents in (corpus.documents for corpus in self.corpora):
            num_tokens = num_learned = 0
            for document in open_documents(documents.spec):
                self.has_chats |= isinstance(document, Chat)
                if not is_held_out(document, documents.held_out_fraction):
                    ids = self.encoder.encode([document])[0]
                    num_tokens += len(ids)
                    num_learned += int((ids >= 0).sum())
                if num_tokens > self.sequence_length and num_learned:
                    break
            else:
                if num_tokens > self.sequence_length:
                    raise DataError(f"--data {documents.spec.path}: its chats have no answer to learn")
                raise DataError(
                    f"--data {documents.spec.path}: {num_tokens} tokens to train on, less than one sequence of "
                    f"{self.sequence_length}; give more text or a smaller --sequence-length"
                )

    def next_windows(self, count: int) -> np.ndarray:
        """Return the next `count` windows, int64 [count, S + 1], with `~token` for tokens that are only read."""
        return np.stack([self._next_corpus().next_window() for _ in range(count)]).astype(np.int64)

    def _next_corpus(self) -> CorpusWindows:
        """Return the corpus with the fewest windows for its weight. Each stays within one window of its share."""

        def progress(corpus: CorpusWindows) -> float:
            # without the half, a corpus of any weight would give its first window before another its second
            return (corpus.drawn + 0.5) / corpus.documents.spec.weight

        return min(self.corpora, key=progress)

    def switch_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Continue with the next documents in another tokenizer. The rest of those that were started is dropped."""
        # the rest may start within a word, where the other tokenizer would give no such tokens
        self.encoder = Encoder(tokenizer)
        for corpus in self.corpora:
            corpus.switch_encoder(self.encoder)

    def state(self) -> list[dict[str, Any]]:
        """Return the position in every corpus as JSON values and int32 arrays. Cheap enough for every step."""
        return [corpus.state() for corpus in self.corpora]

    def load_state(self, state: list[dict[str, Any]]) -> None:
        """Continue from a `state` of a stream with the same settings. Raises DataError."""
        if len(state) != len(self.corpora):
            raise DataError(f"the checkpoint was written with {len(state)} --data corpora, not {len(self.corpora)}")
        for corpus, values in zip(self.corpora, state, strict=True):
            corpus.load_state(values)


class PrefetchedStream(PackedStream):
    """A PackedStream that reads ahead as many windows as the last call returned, in a thread.

    Windows and positions are those of a PackedStream to the bit. Text is tokenised outside Python's lock.
    """

    def __init__(self, specs: Sequence[DataSpec], tokenizer: PreTrainedTokenizerBase, *settings: Any) -> None:
        """Take the arguments of a PackedStream. The thread has a tokenizer of its own, as none may be set up in use."""
        super().__init__(specs, copy.deepcopy(tokenizer), *settings)
        self._worker = ThreadPoolExecutor(1, "windows")
        self._ahead: Future[np.ndarray] | None = None
        self._count = 0
        """Windows that the thread reads."""
        self._position: list[dict[str, Any]] = []
        """Position before them."""

    def next_windows(self, count: int) -> np.ndarray:
        """Return the next `count` windows, int64 [count, S + 1], and read as many ahead.

        An error of the text is raised by the call that returns its windows.
        """
        if count != self._count:
            self._rewind()
        ahead, self._ahead = self._ahead, None
        windows = ahead.result() if ahead is not None else super().next_windows(count)
        # noted before the thread moves it: a checkpoint needs the position after the windows that were returned
        self._position, self._count = super().state(), count
        self._ahead = self._worker.submit(super().next_windows, count)
        return windows

    def state(self) -> list[dict[str, Any]]:
        return self._position if self._ahead is not None else super().state()

    def load_state(self, state: list[dict[str, Any]]) -> None:
        self._wait()
        super().load_state(state)

    def switch_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._rewind()
        super().switch_tokenizer(copy.deepcopy(tokenizer))

    def _rewind(self) -> None:
        """Return to the position before the windows that were read ahead."""
        if self._ahead is not None:
            self.load_state(self._position)

    def _wait(self) -> None:
        """Wait for the thread, and drop its windows and errors."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.exception()


def held_out_windows(
    specs: Sequence[DataSpec],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    held_out_fraction: float,
    max_tokens: int,
) -> np.ndarray:
    """Return about `max_tokens` of held-out text as windows, int64 [n, S + 1], the same for every seed.

    Each corpus gives an equal share, from as many of its held-out documents as the share has windows. The first window
    of each document comes before the second of any. A corpus that holds back less than a window gives one that ends in
    `~separator`, which is not predicted. Raises DataError if a corpus holds back nothing.
    """
    windows = []
    encoder = Encoder(tokenizer)
    for spec in specs:
        wanted = max(1, max_tokens // len(specs) // sequence_length)
        found = _spread_windows(_held_out_ids(spec, encoder, held_out_fraction), sequence_length, wanted)
        if not found:
            ids = [token for document in _held_out_ids(spec, encoder, held_out_fraction) for token in document]
            if not ids:
                raise nothing_held_out(spec)
            _log.warning(f"--data {spec.path}: only {len(ids)} tokens are held out, so perplexities are imprecise")
            window = np.full(sequence_length + 1, ~np.int64(encoder.separator))
            window[: len(ids)] = ids
            found = [window]
        windows += found
    stacked = np.stack(windows).astype(np.int64)
    if not (stacked[:, 1:] >= 0).any():
        raise DataError(
            f"the held-out windows of {sequence_length} tokens contain no token of an answer to predict; give more "
            "--eval-tokens or a longer --sequence-length"
        )
    return stacked


def _held_out_ids(spec: DataSpec, encoder: Encoder, held_out_fraction: float) -> Iterator[list[int]]:
    for document in open_documents(spec):
        if is_held_out(document, held_out_fraction):
            yield encoder.encode([document])[0].tolist()


def _spread_windows(documents: Iterator[list[int]], sequence_length: int, wanted: int) -> list[np.ndarray]:
    """Return up to `wanted` windows. Short documents are packed, and each pack gives a window before any a second."""
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
    while len(windows) < wanted:
        end = start + sequence_length + 1
        found = [each[start:end] for each in packs if len(each) >= end]
        if not found:
            break
        windows += found
        start += sequence_length
    return windows[:wanted]
