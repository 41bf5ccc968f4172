"""Readers of corpus files: each format yields its documents one at a time.

A DataError names the file and the place of a malformed record. records.py converts a record to its document.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from ...runtime.base.errors import DataError
from ...runtime.base.extras import extra
from .chat import Document
from .records import ReadContext, document_of, form_of

_log = logging.getLogger("efficientllm.train")

TEXT_DOCUMENT_CHARACTERS = 4096
"""A .txt or .md file is split into documents at the first blank line after this many characters."""

CSV_FIELD_BYTES = 2**31 - 1
"""The largest limit that Python's csv accepts on all platforms. Its default, 128 KiB, is less than a long document."""


def _parse_json(context: ReadContext, content: bytes, place: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig").strip("\r\n"))  # the error of a cut line names its open string
    except UnicodeDecodeError as error:
        raise context.not_utf8(error, f"{place} is ") from error
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits, thousands of brackets
        raise context.error(f"{place} is not a JSON object that can be read: {error}") from error


def _json_value(context: ReadContext, content: bytes) -> Any:
    """Return the JSON value of some bytes, or None if they are not JSON."""
    try:
        return _parse_json(context, content, "")
    except DataError:
        return None


def _read_jsonl(stream: Iterable[bytes], context: ReadContext) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            yield document_of(context, _parse_json(context, line, f"line {number}"), f"line {number}")
        except DataError as error:
            context.bad_lines.add(error)


def _read_json(stream: IO[bytes], context: ReadContext) -> Iterator[Document]:
    """Read an object, an array of objects (whole in memory), or lines of objects, as in C4's .json.gz."""
    first = stream.readline()
    if isinstance(_json_value(context, first), dict):
        yield from _read_jsonl(itertools.chain([first], stream), context)
        return
    content = first + stream.read()
    value = _json_value(context, content)
    if value is None:
        if content.lstrip().startswith(b"["):
            _parse_json(context, content, "the file")
        yield from _read_jsonl(io.BytesIO(content), context)
        return
    yield from read_records(value if isinstance(value, list) else [value], context, "document")


def read_records(values: Iterable[Any], context: ReadContext, kind: str, first: int = 1) -> Iterator[Document]:
    """Yield the document of each value and count malformed ones as bad lines.

    Errors call a value `kind` and its number, which starts at `first`.
    """
    for number, value in enumerate(values, first):
        try:
            yield document_of(context, value, f"{kind} {number}")
        except DataError as error:
            context.bad_lines.add(error)


def without_added_nulls(value: Any, is_inside: bool = False) -> Any:
    """Return a row of an Arrow table without the null fields of its functions and calls."""
    # objects of an Arrow column have the fields of all rows, so a function would get the parameters of all others
    if isinstance(value, dict):
        return {
            name: without_added_nulls(each, is_inside or name in ("tools", "tool_calls"))
            for name, each in value.items()
            if each is not None or not is_inside
        }
    return [without_added_nulls(each, is_inside) for each in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _decoded(stream: IO[bytes], context: ReadContext, newline: str | None = None) -> Iterator[IO[str]]:
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise context.not_utf8(error) from error


def _read_csv(stream: IO[bytes], context: ReadContext) -> Iterator[Document]:
    """Read a column of the rows under a header."""
    csv.field_size_limit(CSV_FIELD_BYTES)
    with _decoded(stream, context, newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        try:
            if form_of(rows.fieldnames or (), context.field):
                yield from read_records(rows, context, "row")
                return
            if context.field not in (rows.fieldnames or ()):
                names = list(rows.fieldnames or ())
                error = context.missing("no column", names)
                if len(names) == 1 and (found := re.search(r"[;\t|]", names[0])):
                    error = DataError(f"{error}; commas must separate columns, not {found[0]!r}")
                raise error
            for row in rows:
                if isinstance(row[context.field], str):
                    yield row[context.field]
                else:
                    place = f"the row that ends at line {rows.line_num}"
                    context.bad_lines.add(context.error(f'{place} has no "{context.field}"'))
        except csv.Error as error:
            place = f"the row that begins at line {rows.line_num + 1}"
            raise context.error(f"malformed CSV in {place}: {error}") from error


def _read_txt(stream: IO[bytes], context: ReadContext) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with _decoded(stream, context) as text:
        for number, line in enumerate(text, 1):
            if "\0" in line:
                hint = "binary, or UTF-16 (iconv -f utf-16 -t utf-8)"
                raise context.error(f"line {number} contains zero bytes; it is {hint}")
            lines.append(line)
            size += len(line)
            # at a blank line, so that no paragraph is cut
            if size >= TEXT_DOCUMENT_CHARACTERS and not line.strip():
                yield "".join(lines)
                lines, size = [], 0
    yield "".join(lines)


def _read_parquet(stream: IO[bytes], context: ReadContext) -> Iterator[Document]:
    """Read the rows of a column without loading the file."""
    with extra("datasets"):
        import pyarrow
        import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        form = form_of([name for name in names if names.count(name) == 1], context.field)
        if form is not None:
            columns = [name for name in names if name in (form.field, *form.other_fields)]
            batches = file.iter_batches(columns=columns)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from read_records(map(without_added_nulls, rows), context, "row")
            return
        if names.count(context.field) != 1:
            raise context.missing("no column", names)
        kind = file.schema_arrow.field(context.field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind  # text that is stored once and numbered
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise context.error(f'column "{context.field}" has type {kind}, not text{context.field_hint}')
        for batch in file.iter_batches(columns=[context.field]):
            yield from batch.column(0).to_pylist()
    except UnicodeDecodeError as error:
        raise context.not_utf8(error) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise context.error(str(error)) from error


Reader = Callable[[IO[bytes], ReadContext], Iterator[Document]]

TEXT_READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".md": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
"""Reader of each file suffix, which a suffix of compression may follow. A new format is one entry."""

TABLE_READERS: dict[str, Reader] = {".parquet": _read_parquet}
"""Readers of formats that have their own compression."""

ARROW_FILES = (*TABLE_READERS, ".zst")
"""Ends of the names of files that need pyarrow."""

KNOWN_FILES = f"{', '.join(TEXT_READERS)} (each also .gz or .zst), {', '.join(TABLE_READERS)}"


def reader_of(path: Path) -> Reader | None:
    """Return the reader for a file name, or None if its suffix is unknown."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    readers = TEXT_READERS | (TABLE_READERS if name == path.name else {})
    return next((reader for suffix, reader in readers.items() if name.endswith(suffix)), None)


def read_documents(path: Path, reader: Reader, context: ReadContext) -> Iterator[Document]:
    """Yield the documents of a file, decompressed according to its suffix."""
    with _opened(path, context) as stream:
        yield from reader(stream, context)


@contextlib.contextmanager
def _opened(path: Path, context: ReadContext) -> Iterator[IO[bytes]]:
    if path.suffix == ".gz":
        try:
            with gzip.open(path, "rb") as stream:
                yield cast(IO[bytes], stream)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise context.error(f"not a complete gzip file: {error}") from error
    elif path.suffix == ".zst":
        with extra("datasets"):
            import pyarrow
        try:
            with pyarrow.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as buffered:
                yield buffered
        except OSError as error:
            raise context.error(f"not a complete zstd file: {error}") from error
    else:
        with path.open("rb") as stream:
            yield stream
