"""A tokenizer.json with its configuration, for engines whose files hold no tokenizer."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..base.errors import ArtefactError


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable character -> byte (GPT-2's bytes_to_unicode, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class HfTokenizer:
    """Token ids, token bytes and chat template of a folder with tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtefactError(f"{folder} has no tokenizer.json; copy the whole folder or export again")
        self._tokenizer = Tokenizer.from_file(str(path))
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self._is_sentencepiece = bool(data["model"].get("byte_fallback"))
        self._special = {token["id"] for token in data.get("added_tokens", []) if token["special"]}
        self.vocab_size = self._tokenizer.get_vocab_size()
        config = folder / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        self.bos_token, self.eos_token = (_content(settings.get(f"{name}_token")) for name in ("bos", "eos"))
        template = folder / "chat_template.jinja"
        self.chat_template: str | None = (
            template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
        )
        bos = self._tokenizer.token_to_id(self.bos_token) if self.bos_token else None
        self.adds_bos = bos is not None and self._tokenizer.encode("x").ids[:1] == [bos]

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids; without `special`, text that looks like a control token stays text."""
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of a token; b"" for control tokens and unknown ids."""
        text = self._tokenizer.id_to_token(token)
        if text is None or token in self._special:
            return b""
        if not self._is_sentencepiece:
            alphabet = byte_alphabet()
            known = all(character in alphabet for character in text)
            return bytes(alphabet[character] for character in text) if known else text.encode("utf-8")
        if len(text) == 6 and text.startswith("<0x"):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode("utf-8")


def _content(token: Any) -> str:
    return (token.get("content") if isinstance(token, dict) else token) or ""
