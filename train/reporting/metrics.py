"""Progress of a run, and its metrics: metrics.jsonl always, TensorBoard on request.

Imports no torch unless TensorBoard is used.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...runtime.base.errors import MissingExtraError
from ...runtime.base.files import write_text_atomically, writing

FILE_NAME = "metrics.jsonl"

SPEED_SECONDS = 60.0
"""Length of the period that a displayed speed is averaged over."""

_log = logging.getLogger("efficientllm.train")


@dataclass
class RunProgress:
    """Progress of a run, which its checkpoints store."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    skipped_in_a_row: int = 0
    """Latest consecutive steps that were skipped for a non-finite loss or gradient."""
    perplexity: dict[str, float] = field(default_factory=dict)
    """Held-out perplexities by stage: source, after_pruning, final."""
    bits_per_byte: dict[str, float] = field(default_factory=dict)
    """Bits per byte of the same text by stage, if the vocabulary may shrink."""
    quality: dict[str, Any] = field(default_factory=dict)
    """Quality (see evaluation.quality) of source and final, as JSON values."""
    seconds: float = 0.0
    """Wall time spent training, over all resumed parts."""


class Throughput:
    """Measures the speed of the steps of the last minute. The time between steps is not counted."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque()
        """Tokens and seconds of each step."""

    def add(self, tokens: int, seconds: float) -> None:
        """Add one step."""
        self._steps.append((tokens, seconds))
        while sum(each for _, each in self._steps) - self._steps[0][1] >= SPEED_SECONDS:
            self._steps.popleft()

    @property
    def tokens_per_second(self) -> float:
        """Return the speed, or 0 before the first step."""
        seconds = sum(each for _, each in self._steps)
        return sum(tokens for tokens, _ in self._steps) / seconds if seconds else 0.0


def check_tensorboard(is_used: bool) -> None:
    """Raise MissingExtraError if --tensorboard is used and not installed."""
    if is_used and find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "tensorboard")


class MetricsWriter:
    """Writes one record per step. Ranks other than the main one write nothing."""

    def __init__(self, folder: Path, is_main: bool, tensorboard: bool = False) -> None:
        self.path, self.is_main, self.uses_tensorboard = folder / FILE_NAME, is_main, tensorboard
        self._tensorboard: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """Log one record. A DiskFullError leaves the file unchanged."""
        if not self.is_main:
            return
        with writing(self.path):
            self._append(json.dumps(record) + "\n")
            if self.uses_tensorboard:
                self._send(record)

    def _append(self, line: str) -> None:
        rest = line.encode()
        # unbuffered: a full disk shows in `write`, and half a line is cut off again
        with self.path.open("ab", buffering=0) as stream:
            size = stream.tell()
            try:
                while rest:
                    rest = rest[stream.write(rest) :]
            except OSError:
                stream.truncate(size)
                raise

    def _send(self, record: dict[str, Any]) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path.parent / "tensorboard"))
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        numbers |= {f"next_saliency/{kind}": value for kind, value in record.get("next_saliency", {}).items()}
        for key, value in numbers.items():
            self._tensorboard.add_scalar(key, value, record["tokens"])

    def truncate(self, progress: RunProgress, is_logged: bool = True) -> None:
        """Remove damaged lines, and records that a killed run wrote after the checkpoint that is resumed.

        `is_logged` tells whether the checkpoint was written after the record of its step.
        """
        if not self.is_main or not self.path.is_file():
            return
        records, num_damaged = _read(self.path)
        if num_damaged:
            _log.warning(f"{self.path}: {num_damaged} damaged lines are skipped")
        # the resumed run writes the record of its step again if the checkpoint was written before it
        last_step = progress.step if is_logged else progress.step - 1
        kept = [record for record in records if _is_before(record, last_step, progress)]
        write_text_atomically(self.path, "".join(f"{json.dumps(record)}\n" for record in kept))

    def close(self) -> None:
        """Write pending records. Raises DiskFullError if they do not fit."""
        with writing(self.path.parent):
            if self._tensorboard is not None:
                self._tensorboard.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run without damaged lines."""
    return _read(folder / FILE_NAME)[0]


def _is_before(record: dict[str, Any], last_step: int, progress: RunProgress) -> bool:
    """Return True if a record is of `last_step` or before, and no stage that `progress` has not measured."""
    stage = next((key for key in record if key.startswith("perplexity_")), None)
    is_measured = stage is None or stage.removeprefix("perplexity_") in progress.perplexity
    return record["step"] <= last_step and is_measured


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records and the number of damaged lines, without the last line if a killed run cut it."""
    *lines, last = path.read_bytes().split(b"\n")
    records = [_parse(line) for line in lines]
    num_damaged = records.count(None)
    return [record for record in (*records, _parse(last)) if record is not None], num_damaged


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and all(isinstance(record.get(name), int) for name in ("step", "tokens"))
    return record if is_record else None
