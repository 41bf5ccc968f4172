"""`efficientllm-corpus`: write one file of documents from folders, files and hub datasets.

A run can read the file many times without a hub.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.extras import require_extra
from ...runtime.base.files import remove_stale_temporaries, written_atomically
from ...runtime.base.model_names import check_source
from ...runtime.base.output import check_place, locked_output
from ...runtime.base.progress import ProgressDisplay
from ...runtime.base.quantities import format_bytes, markdown_table
from .chat import Chat, Document, Encoder
from .documents import DataSpec, check_documents, open_documents, text_of
from .readers import KNOWN_FILES, reader_of
from .records import BadLines

SUFFIXES = (".jsonl.gz", ".jsonl")
GZIP_LEVEL = 6


@dataclass(frozen=True)
class CorpusConfig:
    """Corpus."""

    data: tuple[str, ...] = ()
    """Source of documents, PATH[:WEIGHT], repeatable: a file, a folder with its subfolders, or a hub dataset
    (owner/name, owner/name@config). Weights are shares of the bytes."""
    max_bytes: int = flags.byte_count(100_000_000, at_least=1)
    """Bytes of text to take, as 100MB. The document that reaches the limit is the last."""
    min_characters: int = flags.number(200, at_least=0)
    """Skip documents of fewer characters."""
    text_field: str = "text"
    """JSON field or table column that holds the text."""
    skip_bad_lines: int = flags.number(0, at_least=0)
    """Malformed lines of a corpus to skip. One more is an error."""
    tokenizer: str = ""
    """Model whose tokens of the text are stored in the folder OUTPUT.tokens. efficientllm-train then reads these."""

    def __post_init__(self) -> None:
        flags.check_fields(self)


@dataclass
class CorpusInput:
    """One --data value: its documents, and counts of those that were taken and skipped."""

    spec: DataSpec
    documents: Iterator[Document]
    num_taken: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the documents that were taken."""
    num_short: int = 0
    num_repeated: int = 0
    """Documents skipped because their text was taken before."""
    has_ended: bool = False
    """True once all documents have been read."""


def write_corpus(
    output: Path, config: CorpusConfig, overwrite: bool, report: Callable[[int, int], None]
) -> list[CorpusInput]:
    """Write `output` completely or not at all, and return its inputs with their counts.

    `report` is called with the bytes taken and wanted. Raises UsageError, DataError or DiskFullError.
    """
    if not config.data:
        raise UsageError("--data is missing: name a file, a folder or a hub dataset")
    if config.tokenizer:
        check_source(config.tokenizer, f"--tokenizer {config.tokenizer}")
        require_extra("train", "torch", "transformers")
    if not output.name.endswith(SUFFIXES):
        raise UsageError(f"{output}: the file must be called NAME.jsonl.gz or NAME.jsonl")
    specs = [DataSpec.parse(text, config.skip_bad_lines, config.text_field) for text in config.data]
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name a file")
    check_place(output, is_renamed=True, flag="OUTPUT")
    with locked_output(output, "OUTPUT"):
        if output.exists() and not overwrite:
            raise UsageError(f"{output} already exists; give another name, or --overwrite to replace it")
        remove_stale_temporaries(output)
        inputs = [CorpusInput(spec, _documents(spec, output)) for spec in specs]
        with written_atomically(output) as file:
            with _gzipped(file) if output.name.endswith(".gz") else contextlib.nullcontext(file) as stream:
                for document in _interleave(inputs, config, report):
                    stream.write((_record(document) + "\n").encode())
            # inside the block, whose failure keeps a file that --overwrite would replace
            if not any(each.num_taken for each in inputs):
                short = sum(each.num_short for each in inputs)
                reason = "there are none"
                if short:
                    reason = f"all {short} have fewer than {config.min_characters} characters; lower --min-characters"
                raise UsageError(f"no document was taken: {reason}")
    return inputs


def _gzipped(file: IO[bytes]) -> IO[bytes]:
    """Return a gzip stream into `file`."""
    # without name and time in its header, so that equal documents give equal files
    return cast(IO[bytes], gzip.GzipFile("", "wb", GZIP_LEVEL, file, 0))


def _record(document: Document) -> str:
    return document.to_json() if isinstance(document, Chat) else json.dumps({"text": document}, ensure_ascii=False)


def _documents(spec: DataSpec, output: Path) -> Iterator[Document]:
    """Return an iterator over the documents of a file, a hub dataset, or all files of a folder and its subfolders.

    Hidden files and `output` are skipped. Raises UsageError or DataError if the start of a file cannot be read.
    """
    path = Path(spec.path)
    parts = [spec]
    if path.is_dir():
        parts = [replace(spec, path=str(file)) for file in _files_of(path) if not _is_same(file, output)]
        if not parts:
            raise UsageError(f"--data {spec.path}: the folder and its folders hold no {KNOWN_FILES} file")
    elif _is_same(path, output):
        raise UsageError(f"{output} is also read by --data {spec.path}; give another name")
    for part in parts:
        check_documents(part)
    bad_lines = BadLines(spec.skip_bad_lines)
    return itertools.chain.from_iterable(open_documents(part, bad_lines) for part in parts)


def _is_same(path: Path, output: Path) -> bool:
    return path.exists() and output.exists() and output.samefile(path)


def _files_of(folder: Path) -> list[Path]:
    """Return the readable files of a folder and its subfolders, sorted, with links followed.

    Raises UsageError if a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"--data {folder}: {error.filename} cannot be read: {error.strerror}")

    found = list[Path]()
    visited = set[str]()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a circular link, or a second link to the same folder
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = (Path(place, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.is_file() and reader_of(file) is not None]
    return sorted(found)


def _interleave(
    inputs: Sequence[CorpusInput], config: CorpusConfig, report: Callable[[int, int], None]
) -> Iterator[Document]:
    """Yield distinct documents of the inputs until there are `max_bytes`, and count them.

    The next document comes from the input with the fewest bytes for its weight. Inputs that have ended do not count.
    """
    digests: set[bytes] = set()
    total = 0
    open_inputs = list(inputs)
    while total < config.max_bytes and open_inputs:
        source = min(open_inputs, key=lambda each: each.num_bytes / each.spec.weight)
        document = next(source.documents, None)
        if document is None:
            source.has_ended = True
            open_inputs = [each for each in open_inputs if each is not source]
            continue
        text = text_of(document)
        content = text.encode()
        digest = hashlib.blake2b(content, digest_size=16).digest()  # 16 bytes a document, not its text
        if len(text) < config.min_characters:
            source.num_short += 1
        elif digest in digests:
            source.num_repeated += 1
        else:
            digests.add(digest)
            source.num_taken += 1
            source.num_bytes += len(content)
            total += len(content)
            report(min(total, config.max_bytes), config.max_bytes)
            yield document


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        CorpusConfig,
        prog="efficientllm-corpus",
        examples=(
            "corpus corpus.jsonl.gz --data notes/",
            "corpus corpus.jsonl.gz --data web.jsonl:0.7 --data books/:0.3 --max-bytes 100MB",
        ),
        description="Write one file of documents, for --data of efficientllm-train, from folders, files and hub "
        "datasets. They are mixed by their weights, and each text is written once.",
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

        inputs = write_corpus(output, config, overwrite, report)
        if config.tokenizer:
            from ..model.source import load_tokenizer
            from .tokens import write_tokens

            encoder = Encoder(load_tokenizer(config.tokenizer, "--tokenizer"))
            num_tokens = write_tokens(DataSpec(str(output)), encoder)
            display.say(f"tokens: {num_tokens:,}")
    rows = [["from", "documents", "text", "too short", "repeated"]]
    for each in inputs:
        name = each.spec.path + (" (all of it)" if each.has_ended else "")
        rows.append(
            [name, f"{each.num_taken:,}", format_bytes(each.num_bytes), f"{each.num_short:,}", f"{each.num_repeated:,}"]
        )
    print(markdown_table(rows))
    print(f"corpus: {output} ({format_bytes(output.stat().st_size)})")
    return 0
