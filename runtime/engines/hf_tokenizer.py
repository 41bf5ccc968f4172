"""Read a tokenizer.json with its configuration, for engines whose files hold no tokenizer."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..base.errors import ArtefactError


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Return printable character -> byte of byte-level BPE (GPT-2's bytes_to_unicode, inverted)."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [byte for first, last in ranges for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class HfTokenizer:
    """Token ids, token bytes and chat template of a folder with tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        """Read the files in `folder`. Raise ArtefactError if they are missing or damaged."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtefactError(f"{folder} has no tokenizer.json; copy the whole folder or export again")
        self._lock = threading.Lock()
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self._is_sentencepiece = bool(data["model"].get("byte_fallback"))
            special = {token["id"]: token["content"] for token in data.get("added_tokens", []) if token["special"]}
            self._special, self.control_texts = frozenset(special), frozenset(special.values())
            self.vocab_size = self._tokenizer.get_vocab_size()
            settings = read_settings(folder)
            self.bos_token, self.eos_token = (special_token(settings, name) for name in ("bos", "eos"))
            self.chat_template = read_chat_template(folder)
            bos = self._tokenizer.token_to_id(self.bos_token) if self.bos_token else None
            self.adds_bos = bos is not None and self._tokenizer.encode("x").ids[:1] == [bos]
        except Exception as error:  # tokenizers raises plain Exception for every problem
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise ArtefactError(
                f"{folder}: its tokenizer is damaged: {reason}; copy the folder or export it again"
            ) from error

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Return token ids; without `special`, text that looks like a control token stays text."""
        with self._lock:  # the setting belongs to the tokenizer, not to the call
            self._tokenizer.encode_special_tokens = not special
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, b"" for control tokens and unknown ids."""
        text = self._tokenizer.id_to_token(token)
        if text is None or token in self._special:
            return b""
        return text_bytes(text, None if self._is_sentencepiece else byte_alphabet())


def is_byte(text: str) -> bool:
    """Return True if a SentencePiece token is a byte that no other token writes, such as <0x0A>."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def text_bytes(text: str, alphabet: Mapping[str, int] | None) -> bytes:
    """Return the UTF-8 bytes of a token's text in byte-level BPE with `alphabet`, or in SentencePiece without."""
    if alphabet is not None:
        # added tokens are stored as plain text, which may have characters outside the alphabet
        known = all(character in alphabet for character in text)
        return bytes(alphabet[character] for character in text) if known else text.encode("utf-8")
    if is_byte(text):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode("utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the contents of FOLDER/tokenizer_config.json, {} without the file."""
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def special_token(settings: dict[str, Any], name: str) -> str:
    """Return the text of token `name` (bos, eos, unk or pad) in tokenizer_config.json, "" if it has none."""
    token = settings.get(f"{name}_token")
    return (token.get("content") if isinstance(token, dict) else token) or ""


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of chat_template.jinja or tokenizer_config.json.

    None stands for no template and for a list of named ones.
    """
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else read_settings(folder).get("chat_template")
    return template if isinstance(template, str) else None
