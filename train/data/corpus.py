"""One file of documents from folders, files and hub datasets: what a run reads again and again without a hub."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, cast

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.files import written_atomically
from .chat import Chat, Document
from .documents import DataSpec, open_documents, text_of
from .readers import KNOWN_FILES, reader_of

SUFFIXES = (".jsonl.gz", ".jsonl")
COMPRESSION = 6


@dataclass(frozen=True)
class CorpusConfig:
    """corpus"""

    data: tuple[str, ...] = ()
    """Where documents come from, PATH[:WEIGHT], repeatable: a file, a folder with all its folders, a hub dataset
    (owner/name, owner/name@config); weights are shares of the bytes."""
    max_bytes: int = flags.byte_count(100_000_000)
    """Text to take, as 100MB; the document that reaches it is the last."""
    min_characters: int = 200
    """Shorter documents are left out."""
    text_field: str = "text"
    """Field of JSON or column of a table that holds the text."""
    skip_bad_lines: int = 0
    """Malformed lines of a corpus that may be left out."""

    def __post_init__(self) -> None:
        flags.check_types(self)
        flags.require(self, "max_bytes", self.max_bytes >= 1, "must be positive")
        flags.require(self, "min_characters", self.min_characters >= 0, "must not be negative")
        flags.require(self, "skip_bad_lines", self.skip_bad_lines >= 0, "must not be negative")


@dataclass
class Taken:
    """What was taken of one corpus."""

    spec: DataSpec
    documents: int = 0
    bytes: int = 0
    short: int = 0
    """Left out: too short."""
    repeated: int = 0
    """Left out: the text was there already."""
    has_ended: bool = False
    """Whether all of it was read."""


Report = Callable[[int, int], None]
"""(bytes taken, wanted)"""


def write_corpus(
    output: Path, config: CorpusConfig, overwrite: bool, report: Report = lambda done, total: None
) -> list[Taken]:
    """Write `output`, whole or not at all. UsageError, DataError, DiskFullError."""
    if not config.data:
        raise UsageError("--data is missing: name a file, a folder or a hub dataset")
    if not output.name.endswith(SUFFIXES):
        raise UsageError(f"{output}: the file must be called NAME.jsonl.gz or NAME.jsonl")
    _check_new(output, overwrite)
    specs = [DataSpec.parse(text, config.skip_bad_lines, config.text_field) for text in config.data]
    for spec in specs:
        if Path(spec.path).exists() and output.exists() and output.samefile(spec.path):
            raise UsageError(f"{output} is what --data {spec.path} reads; give another name")
    corpora = [_Corpus(Taken(spec), _documents(spec, output)) for spec in specs]
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(output) as file:
        with _compressed(file) if output.name.endswith(".gz") else contextlib.nullcontext(file) as stream:
            for document in _stirred(corpora, config, report):
                stream.write((_record(document) + "\n").encode())
        if not any(corpus.taken.documents for corpus in corpora):
            raise UsageError(f"no document was taken; all have fewer than {config.min_characters} characters")
        _check_new(output, overwrite)  # again: another command may have ended since
    return [corpus.taken for corpus in corpora]


def _check_new(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise UsageError(f"{output} is there already; give another name, or --overwrite to replace it")


@dataclass
class _Corpus:
    taken: Taken
    documents: Iterator[Document] = field(repr=False)


def _documents(spec: DataSpec, output: Path) -> Iterator[Document]:
    """Of a folder, all files in it and in its folders, by name; neither hidden ones nor the one that is written."""
    folder = Path(spec.path)
    if not folder.is_dir():
        return open_documents(spec)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and reader_of(file) is not None]
    files = [file for file in files if not (output.exists() and output.samefile(file))]
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not shown:
        raise UsageError(f"--data {spec.path}: the folder and its folders hold no {KNOWN_FILES} file")
    return itertools.chain.from_iterable(open_documents(replace(spec, path=str(file))) for file in shown)


def _stirred(corpora: Sequence[_Corpus], config: CorpusConfig, report: Report) -> Iterator[Document]:
    """Documents of the corpora, the one furthest behind its share of the bytes next, until there are enough."""
    seen: set[bytes] = set()
    total = 0
    while total < config.max_bytes and (left := [each for each in corpora if not each.taken.has_ended]):
        corpus = min(left, key=lambda each: each.taken.bytes / each.taken.spec.weight)
        taken, document = corpus.taken, next(corpus.documents, None)
        if document is None:
            taken.has_ended = True
            continue
        text = text_of(document)
        if len(text) < config.min_characters:
            taken.short += 1
            continue
        content = text.encode()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest in seen:
            taken.repeated += 1
            continue
        seen.add(digest)
        taken.documents += 1
        taken.bytes += len(content)
        total += len(content)
        report(min(total, config.max_bytes), config.max_bytes)
        yield document


def _compressed(file: IO[bytes]) -> IO[bytes]:
    """A gzip stream into `file`, without name and time in its header: the same documents are the same file."""
    return cast(IO[bytes], gzip.GzipFile("", "wb", COMPRESSION, file, 0))


def _record(document: Document) -> str:
    return document.to_json() if isinstance(document, Chat) else json.dumps({"text": document}, ensure_ascii=False)
