"""The text of a run in the model's tokens: for training, for measurements and for the refit after a removal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...runtime.base.quantities import display_name, format_count
from ..config.sections import SourceConfig
from ..data.chat import Document, Encoder
from ..data.documents import DataSpec, local_files, open_documents, text_of
from ..data.packing import PackedStream, PrefetchedStream, held_out_windows
from ..vocabulary.frequency import count_tokens
from ..vocabulary.tokenizer_pruning import prune_tokenizer

COUNTED_CHARACTERS = 20_000_000
"""Characters of a corpus up to which its documents are counted, in about two seconds of CPU time."""

SAMPLED_DOCUMENTS = 256
"""Documents whose mean length in tokens stands for a corpus."""

SAMPLED_WINDOWS = 64
"""Windows whose padding stands for a corpus."""

EXTRA_SEED = 1_000_003
"""Added to the run's seed for text in an order that training does not see."""


class RunText:
    """All text of a run in the tokens of its model, which a removal of vocabulary rows replaces."""

    def __init__(
        self,
        data: Sequence[DataSpec],
        tokenizer: PreTrainedTokenizerBase,
        settings: SourceConfig,
        seed: int,
        num_ranks: int,
        prefetches: bool = False,
    ) -> None:
        """Open the corpora with the source's tokenizer. Raises DataError for too little text.

        `prefetches` reads the windows of the next step in a thread, for a device that computes meanwhile.
        """
        self.data, self.settings, self.seed, self.num_ranks = data, settings, seed, num_ranks
        self.source_tokenizer = self.tokenizer = tokenizer
        """Tokenizers of source and model. The model's lacks removed tokens."""
        self.held_out = self._held_out_windows()
        """Windows [n, S + 1]."""
        kind = PrefetchedStream if prefetches else PackedStream
        self.stream = kind(data, tokenizer, settings.sequence_length, settings.held_out_fraction, seed)
        self.stream.check()
        self._extra_windows: dict[int, np.ndarray] = {}

    def _held_out_windows(self) -> np.ndarray:
        settings = self.settings
        length, fraction = settings.sequence_length, settings.held_out_fraction
        return held_out_windows(self.data, self.tokenizer, length, fraction, settings.eval_tokens)

    def extra_windows(self, num_tokens: int) -> np.ndarray:
        """Return windows [n, S + 1] of about `num_tokens` of the training text, in another order than training.

        They are the same for every call with the same vocabulary, and their number is a multiple of the ranks.
        """
        if num_tokens not in self._extra_windows:
            length, fraction = self.settings.sequence_length, self.settings.held_out_fraction
            stream = PackedStream(self.data, self.tokenizer, length, fraction, self.seed + EXTRA_SEED)
            count = max(1, num_tokens // length // self.num_ranks) * self.num_ranks
            self._extra_windows[num_tokens] = stream.next_windows(count)
        return self._extra_windows[num_tokens]

    def count_tokens(self, num_rows: int, num_tokens: int, check: Callable[[], None]) -> np.ndarray:
        """Return the frequency of each of the source's tokens in the training text, fp64 [rows]."""
        fraction = self.settings.held_out_fraction
        return count_tokens(self.data, Encoder(self.source_tokenizer), fraction, num_rows, num_tokens, check)

    def prune_vocabulary(self, kept: Sequence[int]) -> None:
        """Read all text with the source's tokens `kept` from now on."""
        self.tokenizer = prune_tokenizer(self.source_tokenizer, kept)
        self.stream.switch_tokenizer(self.tokenizer)
        self.held_out = self._held_out_windows()
        self._extra_windows.clear()  # they count tokens of the former vocabulary

    def _padding(self, spec: DataSpec) -> float:
        """Return the share of padding in windows of a corpus."""
        length, fraction = self.settings.sequence_length, self.settings.held_out_fraction
        stream = PackedStream([spec], self.source_tokenizer, length, fraction, self.seed + EXTRA_SEED)
        is_filler = stream.next_windows(SAMPLED_WINDOWS) == ~stream.encoder.separator
        return float(np.minimum.accumulate(is_filler[:, ::-1], axis=1).mean())

    def reading_lines(self, num_tokens: int) -> list[str]:
        """Return a line for each local corpus: how many of its documents `num_tokens` of training read, and how often.

        Tokens that are padding of windows read nothing. Larger corpora than COUNTED_CHARACTERS have no line.
        """
        lines, weights = [], sum(spec.weight for spec in self.data)
        for spec in self.data if weights else ():
            count, length, sample = 0, 0, list[Document]()
            for document in open_documents(spec) if local_files(spec.path) else ():
                count, length = count + 1, length + len(text_of(document))
                if length > COUNTED_CHARACTERS:
                    count = 0
                    break
                if len(sample) < SAMPLED_DOCUMENTS:
                    sample.append(document)
            if not count:
                continue
            tokens = sum(map(len, Encoder(self.source_tokenizer).encode(sample))) * count / len(sample)
            passes = num_tokens * spec.weight / weights / tokens * (1 - self._padding(spec))
            read = f"{count:,}" if passes >= 1 else f"about {round(passes * count):,} of {count:,}"
            shown = f"{passes:,.0f}" if passes >= 10 else f"{passes:.2g}"
            lines.append(f"{display_name(spec.path)}: {read} documents are read, {shown} passes")
            if passes < 1:
                lines[-1] += f"; --tokens {format_count(math.ceil(num_tokens / passes))} is one pass"
        return lines
