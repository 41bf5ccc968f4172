"""One file of documents from folders, files and hub datasets: what a run reads again and again without a hub.

`efficientllm-corpus`: a corpus to train on, as one file.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, cast

from ...runtime.base import flags
from ...runtime.base.command import run_command
from ...runtime.base.errors import UsageError
from ...runtime.base.files import remove_left_beside, written_atomically
from ...runtime.base.output import locked_output
from ...runtime.base.progress import ProgressDisplay
from ...runtime.base.quantities import format_bytes, markdown_table
from .chat import Chat, Document
from .documents import DataSpec, check_documents, open_documents, text_of
from .readers import KNOWN_FILES, BadLines, reader_of

SUFFIXES = (".jsonl.gz", ".jsonl")
COMPRESSION = 6


@dataclass(frozen=True)
class CorpusConfig:
    """corpus"""

    data: tuple[str, ...] = ()
    """Where documents come from, PATH[:WEIGHT], repeatable: a file, a folder with all its folders, a hub dataset
    (owner/name, owner/name@config); weights are shares of the bytes."""
    max_bytes: int = flags.byte_count(100_000_000, at_least=1)
    """Text to take, as 100MB; the document that reaches it is the last."""
    min_characters: int = flags.number(200, at_least=0)
    """Shorter documents are left out."""
    text_field: str = "text"
    """Field of JSON or column of a table that holds the text."""
    skip_bad_lines: int = flags.number(0, at_least=0)
    """Malformed lines of a corpus that may be left out."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


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
    specs = [DataSpec.parse(text, config.skip_bad_lines, config.text_field) for text in config.data]
    with locked_output(output):
        _check_new(output, overwrite)
        remove_left_beside(output)
        return _write(output, config, [_Corpus(Taken(spec), _documents(spec, output)) for spec in specs], report)


def _write(output: Path, config: CorpusConfig, corpora: list[_Corpus], report: Report) -> list[Taken]:
    with written_atomically(output) as file:
        with _compressed(file) if output.name.endswith(".gz") else contextlib.nullcontext(file) as stream:
            for document in _stirred(corpora, config, report):
                stream.write((_record(document) + "\n").encode())
        taken = [corpus.taken for corpus in corpora]
        if not any(each.documents for each in taken):
            short = sum(each.short for each in taken)
            reason = f"all {short} have fewer than {config.min_characters} characters" if short else "there are none"
            raise UsageError(f"no document was taken: {reason}")
    return taken


def _check_new(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name a file")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} is there already; give another name, or --overwrite to replace it")


@dataclass
class _Corpus:
    taken: Taken
    documents: Iterator[Document] = field(repr=False)


def _documents(spec: DataSpec, output: Path) -> Iterator[Document]:
    """Of a folder, all files in it and in its folders, by name; neither hidden ones nor the one that is written.

    UsageError or DataError where the beginning of one cannot be read.
    """
    folder = Path(spec.path)
    is_folder = folder.is_dir()
    files = [file for file in _files_of(folder) if not _is_same(file, output)] if is_folder else []
    if is_folder and not files:
        raise UsageError(f"--data {spec.path}: the folder and its folders hold no {KNOWN_FILES} file")
    if not is_folder and _is_same(folder, output):
        raise UsageError(f"{output} is what --data {spec.path} reads; give another name")
    parts = [replace(spec, path=str(file)) for file in files] or [spec]
    for part in parts:
        check_documents(part)
    bad_lines = BadLines(spec.skip_bad_lines)
    return itertools.chain.from_iterable(open_documents(part, bad_lines) for part in parts)


def _is_same(path: Path, output: Path) -> bool:
    return path.exists() and output.exists() and output.samefile(path)


def _files_of(folder: Path) -> list[Path]:
    """Files that can be read, in the folder and its folders, links followed; UsageError where one cannot be listed."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"--data {folder}: {error.filename} cannot be read: {error.strerror}")

    found, seen = list[Path](), set[str]()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link in a circle, or to what was there already
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = (Path(place, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.is_file() and reader_of(file) is not None]
    return sorted(found)


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


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        CorpusConfig,
        prog="efficientllm-corpus",
        description="Write one file of documents, for --data of efficientllm-train, from folders, files and hub "
        "datasets: mixed by their weights, the same text once.",
    )
    parser.add_argument("output", metavar="OUTPUT", help="file to write, NAME.jsonl.gz or NAME.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    output, overwrite = Path(arguments.pop("output")), bool(arguments.pop("overwrite", False))
    config = flags.take(arguments, CorpusConfig)
    with ProgressDisplay() as display:

        def report(done: int, wanted: int) -> None:
            display.update("corpus", done, wanted, f"{format_bytes(done)} of {format_bytes(wanted)} of text")

        taken = write_corpus(output, config, overwrite, report)
    rows = [["from", "documents", "text", "too short", "repeated"]]
    for each in taken:
        counts = [f"{each.documents:,}", format_bytes(each.bytes), f"{each.short:,}", f"{each.repeated:,}"]
        rows.append([each.spec.path + (" (all of it)" if each.has_ended else ""), *counts])
    print(markdown_table(rows))
    print(f"corpus: {output} ({format_bytes(output.stat().st_size)})")
    return 0


def main() -> None:
    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
