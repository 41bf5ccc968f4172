"""The file formats of corpora: from a file to the texts in it, one at a time; a DataError names the place of what is
none."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ...runtime.base.errors import DataError
from ...runtime.base.extras import extra
from .chat import Chat, Document

_log = logging.getLogger("efficientllm.train")

TEXT_DOCUMENT_BYTES = 4096
"""A .txt or .md file is cut into documents at the first blank line after this many bytes."""

MESSAGES = "messages"
"""Field that holds a chat."""

TOOL_FIELDS, CALL_FIELDS = ("tools", "functions"), ("tool_calls", "function_call")
"""Fields of a record and of a message that describe and call functions, in OpenAI's newer and older form."""

RESULT_ROLES = ("tool", "function")
"""Roles of messages that hold the result of a call."""

CSV_FIELD_BYTES = 2**31 - 1
"""The largest limit that Python's csv takes everywhere; its own, 128 KiB, is less than a long document."""


class BadLines:
    """Malformed lines met in one reading of a corpus."""

    def __init__(self, allowed: int, silent: bool = False) -> None:
        self.allowed = allowed
        self.count = 0
        self._silent = silent

    def add(self, error: DataError) -> None:
        """Say which line is left out; the error itself where that is one too many."""
        self.count += 1
        if self.count > self.allowed:
            hint = "" if self.allowed else "; --skip-bad-lines N leaves out up to N such lines"
            raise DataError(f"{error}{hint}") from error
        if not self._silent:
            _log.warning(f"left out: {error}")


@dataclass(frozen=True)
class Reading:
    """What is read, and how."""

    name: str
    """As the user typed it, or the file's within a folder."""
    field: str
    """What holds the text: a field of JSON, a column of a table."""
    bad_lines: BadLines

    def error(self, what: str) -> DataError:
        return DataError(f"--data {self.name}: {what}")

    def missing(self, where: str, names: Iterable[str]) -> DataError:
        """`where` has fields or columns, and not the one that is asked for."""
        shown = ", ".join(itertools.islice(names, 12))
        return self.error(f'{where} "{self.field}"; it has {shown or "none"} (--text-field NAME reads another)')

    def not_utf8(self, error: UnicodeDecodeError, where: str = "") -> DataError:
        """What the bytes are instead, as far as they tell."""
        if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return self.error(f"{where}not UTF-8 but UTF-16; convert it: iconv -f utf-16 -t utf-8")
        if b"\0" in error.object:
            return self.error(f"{where}not UTF-8; it is binary, no text")
        return self.error(f"{where}not UTF-8 ({error.reason}); convert it, as with: iconv -f latin1 -t utf-8")


def _parsed(reading: Reading, content: bytes, where: str) -> Any:
    """The JSON value of some bytes."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise reading.not_utf8(error, f"{where} is ") from error
    except (ValueError, RecursionError) as error:  # no JSON, an integer of thousands of digits, thousands of brackets
        raise reading.error(f"{where} is not a JSON object that can be read: {error}") from error


def document_of(reading: Reading, value: Any, where: str) -> Document:
    """Return the text of one record, or its chat where it has "messages" and no text.

    Raise a DataError where it has neither, or has functions beside its chat.
    """
    field = reading.field
    if not isinstance(value, dict):
        raise reading.error(f'{where} is not a JSON object with a "{field}" field')
    if field not in value and MESSAGES in value:
        for name in TOOL_FIELDS:
            if value.get(name):
                remedy = f'write them into a system message and delete "{name}", or remove the record'
                raise reading.error(f'{where} has "{name}", and functions cannot be trained yet; {remedy}')
        return _chat_of(reading, value[MESSAGES], where, value.get("cut") is True)
    if field not in value:
        raise reading.missing(f"{where} has no field", value)
    if not isinstance(value[field], str):
        raise reading.error(f'the "{field}" of {where} is not a string (--text-field NAME reads another)')
    return _unicode(reading, value[field], f'the "{field}" of {where}')


def _chat_of(reading: Reading, messages: Any, where: str, is_cut: bool = False) -> Chat:
    """Return the chat of a list of {"role": ..., "content": ...}, as chat datasets and the OpenAI API have it.

    Raise a DataError for a message that holds more than its content, or an answer that holds nothing.
    """
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(messages if isinstance(messages, list) else [None], 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(message, dict):
            _check_message(reading, message, f"message {number} of {where}")
        if not isinstance(role, str) or not isinstance(content, str):
            raise reading.error(f'the "{MESSAGES}" of {where} are no list of {{"role": ..., "content": ...}}')
        turns.append((role, _unicode(reading, content, f"a message of {where}")))
    if not any(role == "assistant" for role, _ in turns):
        raise reading.error(f'the "{MESSAGES}" of {where} hold no answer: none has the role assistant')
    return Chat(tuple(turns), is_cut)


def _check_message(reading: Reading, message: dict[str, Any], where: str) -> None:
    """Raise a DataError for calls and results of functions, for content that is null and for an empty answer."""
    role, content = message.get("role"), message.get("content", "missing")
    for name in CALL_FIELDS:
        if message.get(name):
            remedy = f'write them into its "content" and delete "{name}", or remove the record'
            raise reading.error(f'{where} has "{name}", and calls cannot be trained yet; {remedy}')
    if role in RESULT_ROLES:
        remedy = "give it the role user, or remove the record"
        raise reading.error(f'{where} has the "role" {role}, and results of calls cannot be trained yet; {remedy}')
    if content is None:
        raise reading.error(f'{where} has a "content" that is null; give it a text, or remove the record')
    if role == "assistant" and isinstance(content, str) and not content.strip():
        raise reading.error(f'{where} has an empty "content", which is no answer; give it a text, or remove the record')


def _unicode(reading: Reading, text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a pair, escaped: tokenizers refuse it
        raise reading.error(f"{what} is not Unicode: {error.reason}") from error
    return text


def _jsonl(stream: Iterable[bytes], reading: Reading) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            yield document_of(reading, _parsed(reading, line, f"line {number}"), f"line {number}")
        except DataError as error:
            reading.bad_lines.add(error)


def _json(stream: IO[bytes], reading: Reading) -> Iterator[Document]:
    """An object, an array of objects (held in memory whole), or lines of objects, as C4's .json.gz."""
    first = stream.readline()
    if isinstance(_value_of(reading, first), dict):
        yield from _jsonl(itertools.chain([first], stream), reading)
        return
    content = first + stream.read()
    value = _value_of(reading, content)
    if value is None:
        yield from _jsonl(io.BytesIO(content), reading)
        return
    yield from _records(value if isinstance(value, list) else [value], reading, "document")


def _records(values: Iterable[Any], reading: Reading, kind: str) -> Iterator[Document]:
    """Yield the document of each value; malformed ones count as bad lines. `kind` is what errors call a value."""
    for number, value in enumerate(values, 1):
        try:
            yield document_of(reading, value, f"{kind} {number}")
        except DataError as error:
            reading.bad_lines.add(error)


def _value_of(reading: Reading, content: bytes) -> Any:
    """The JSON value of some bytes, None where they are none."""
    try:
        return _parsed(reading, content, "")
    except DataError:
        return None


@contextlib.contextmanager
def _decoded(stream: IO[bytes], reading: Reading, newline: str | None = None) -> Iterator[IO[str]]:
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise reading.not_utf8(error) from error


def _csv(stream: IO[bytes], reading: Reading) -> Iterator[str]:
    csv.field_size_limit(CSV_FIELD_BYTES)
    with _decoded(stream, reading, newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        try:
            if reading.field not in (rows.fieldnames or ()):
                raise reading.missing("no column", rows.fieldnames or ())
            for row in rows:
                if isinstance(row[reading.field], str):
                    yield row[reading.field]
                else:
                    where = f"the row that ends at line {rows.line_num}"
                    reading.bad_lines.add(reading.error(f'{where} has no "{reading.field}"'))
        except csv.Error as error:
            raise reading.error(f"no CSV at line {rows.line_num}: {error}") from error


def _txt(stream: IO[bytes], reading: Reading) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with _decoded(stream, reading) as text:
        for number, line in enumerate(text, 1):
            if "\0" in line:
                hint = "binary, or UTF-16 (iconv -f utf-16 -t utf-8)"
                raise reading.error(f"line {number} holds zero bytes; it is {hint}")
            lines.append(line)
            size += len(line)
            if size >= TEXT_DOCUMENT_BYTES and not line.strip():
                yield "".join(lines)
                lines, size = [], 0
    yield "".join(lines)


def _parquet(stream: IO[bytes], reading: Reading) -> Iterator[Document]:
    with extra("datasets"):
        import pyarrow
        import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        if reading.field not in names and names.count(MESSAGES) == 1:
            columns = [name for name in names if name in (MESSAGES, *TOOL_FIELDS)]
            batches = file.iter_batches(columns=columns)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from _records(rows, reading, "row")
            return
        if names.count(reading.field) != 1:
            raise reading.missing("no column", names)
        kind = file.schema_arrow.field(reading.field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise reading.error(f'column "{reading.field}" holds {kind}, no text (--text-field NAME reads another)')
        for batch in file.iter_batches(columns=[reading.field]):
            yield from batch.column(0).to_pylist()
    except UnicodeDecodeError as error:
        raise reading.not_utf8(error) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise reading.error(str(error)) from error


Reader = Callable[[IO[bytes], Reading], Iterator[Document]]

TEXT_READERS: dict[str, Reader] = {".txt": _txt, ".md": _txt, ".jsonl": _jsonl, ".json": _json, ".csv": _csv}
"""Reader of each file suffix, which one of a compression may follow; the shortest way to add a format."""

TABLE_READERS: dict[str, Reader] = {".parquet": _parquet}
"""Of formats that compress by themselves."""

KNOWN_FILES = f"{', '.join(TEXT_READERS)} (each also .gz or .zst), {', '.join(TABLE_READERS)}"


def reader_of(path: Path) -> Reader | None:
    """What reads a file of this name."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    readers = TEXT_READERS | (TABLE_READERS if name == path.name else {})
    return next((reader for suffix, reader in readers.items() if name.endswith(suffix)), None)


def read_documents(path: Path, reader: Reader, reading: Reading) -> Iterator[Document]:
    """The documents of a file, decompressed as its suffix says."""
    with _opened(path, reading) as stream:
        yield from reader(stream, reading)


@contextlib.contextmanager
def _opened(path: Path, reading: Reading) -> Iterator[IO[bytes]]:
    if path.suffix == ".gz":
        try:
            with gzip.open(path, "rb") as stream:
                yield cast(IO[bytes], stream)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise reading.error(f"not a whole gzip file: {error}") from error
    elif path.suffix == ".zst":
        with extra("datasets"):
            import pyarrow
        try:
            with pyarrow.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as buffered:
                yield buffered
        except OSError as error:
            raise reading.error(f"not a whole zstd file: {error}") from error
    else:
        with path.open("rb") as stream:
            yield stream
