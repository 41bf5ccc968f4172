"""Tokens of a corpus on disk, in a folder beside it, so that runs neither read nor tokenise its text again.

The folder has the tokens of all documents in their stored order (int32, `~token` for tokens that are only read), the
end of each document, and the hash that decides whether it is held out. A run maps the tokens into memory, so all ranks
of a machine share one copy. Documents have the same order and the same tokens as without the folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.base.errors import UsageError
from ...runtime.base.files import folder_written_atomically, write_json_atomically
from .chat import Encoder
from .documents import DataSpec, corpus_fingerprint, open_documents, split_hash

_log = logging.getLogger("efficientllm.train")

SUFFIX = ".tokens"
"""Added to the name of a corpus."""
BATCH = 256
"""Documents tokenised in one call."""


def token_folder(corpus: str | Path) -> Path:
    """Return the folder of the tokens of a corpus."""
    return Path(f"{corpus}{SUFFIX}")


def _description(spec: DataSpec, encoder: Encoder) -> dict[str, str]:
    """Return everything that the tokens of a corpus depend on."""
    template = encoder.chat_format.template if encoder.chat_format is not None else ""
    backend: Any = encoder.tokenizer.backend_tokenizer
    content = [backend.to_str(), template, str(encoder.separator), spec.text_field]
    digest = hashlib.sha256("\0".join(content).encode("utf-8", "surrogatepass")).hexdigest()
    return {"corpus": corpus_fingerprint(spec.path), "tokenizer": digest}


def write_tokens(spec: DataSpec, encoder: Encoder) -> int:
    """Tokenise a file or folder of text into its `token_folder`, and return the number of tokens.

    Raises UsageError or DataError.
    """
    if not Path(spec.path).exists():
        raise UsageError(f"{spec.flag} {spec.path}: only local text is tokenised; write it to a file first")
    documents = open_documents(spec)
    ends, hashes = [0], list[int]()
    with folder_written_atomically(token_folder(spec.path)) as temporary:
        with (temporary / "ids.bin").open("wb") as stream:
            while batch := list(itertools.islice(documents, BATCH)):
                for document, ids in zip(batch, encoder.encode(batch), strict=True):
                    stream.write(ids.tobytes())
                    ends.append(ends[-1] + len(ids))
                    hashes.append(split_hash(document))
        np.save(temporary / "ends.npy", np.asarray(ends, np.int64))
        np.save(temporary / "hashes.npy", np.asarray(hashes, np.uint64))
        write_json_atomically(temporary / "tokens.json", _description(spec, encoder))
    return ends[-1]


class StoredTokens:
    """The tokens of one corpus."""

    def __init__(self, folder: Path, held_out_fraction: float) -> None:
        """Map the tokens of `folder`, without those of held-out documents."""
        self._ends = np.load(folder / "ends.npy", mmap_mode="r")
        num_tokens = int(self._ends[-1])
        self._ids = np.memmap(folder / "ids.bin", np.int32, mode="r", shape=(num_tokens,))
        limit = min(int(np.ceil(held_out_fraction * 2**64)), 2**64 - 1)  # as in documents.is_held_out
        self.documents = np.flatnonzero(np.load(folder / "hashes.npy") >= np.uint64(limit))
        """Numbers of the documents to train on, int64 [n], in their stored order."""

    def __getitem__(self, number: int) -> np.ndarray:
        """Return the tokens of a document, int32 [n]."""
        return np.array(self._ids[self._ends[number] : self._ends[number + 1]])


def open_tokens(spec: DataSpec, encoder: Encoder, held_out_fraction: float) -> StoredTokens | None:
    """Return the stored tokens of a corpus, or None if there are none of this tokenizer and this text."""
    folder = token_folder(spec.path)
    if not (folder / "tokens.json").is_file():
        return None
    if json.loads((folder / "tokens.json").read_text(encoding="utf-8")) != _description(spec, encoder):
        _log.info(f"{folder} is of another tokenizer, chat template or text: the text of {spec.path} is read")
        return None
    return StoredTokens(folder, held_out_fraction)
