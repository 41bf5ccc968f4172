"""Code for apps, with this model's constants in it."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from ...runtime.base.files import write_text_atomically
from ..generation_defaults import generation_defaults
from .kit import Kit

LLAMA_RN = "0.12.9"
REACT_NATIVE_EXECUTORCH = "0.10.2"
"""The releases whose type declarations the code was written against."""

LLAMA_CPP = "0c1e57098"
"""The commit that llama-cpp-python 0.3.36 is built from, whose header the code was written against."""

CONVERSATIONS = {
    "Chat.kt": "executorch",
    "Chat.swift": "executorch",
    "LlamaChat.kt": "llama.cpp",
    "LlamaChat.swift": "llama.cpp",
}
"""Code that writes a conversation itself -> the engine that reads it."""


def write_snippets(kit: Kit, folder: Path) -> None:
    """Write the kit's code."""
    checkpoint, defaults = kit.checkpoint, generation_defaults(kit.checkpoint)
    ends = checkpoint.end_of_generation_ids
    end = (checkpoint.tokenizer.id_to_token(ends[0]) or "") if ends else ""
    marks = {
        "NAME": kit.name,
        "FOLDER": re.sub(r"[^A-Za-z0-9._-]", "-", kit.name) or "model",
        "FILES": " ".join(kit.pushed),
        "CONTEXT": str(kit.context),
        "EXECUTORCH": kit.executorch,
        "LLAMA_CPP": LLAMA_CPP,
        "LLAMA_RN": LLAMA_RN,
        "REACT_NATIVE_EXECUTORCH": REACT_NATIVE_EXECUTORCH,
        **{option.upper(): f"{value:g}" if value % 1 else f"{value:.1f}" for option, value in defaults.items()},
    }
    source = resources.files(__name__.rpartition(".")[0]).joinpath("code")
    for file in kit.snippets:
        quote = _kotlin if file.endswith(".kt") else _quoted
        literals = {"END": quote(end)}
        if file in CONVERSATIONS:
            check = kit.checks[CONVERSATIONS[file]]
            before, _, after = check.prompt.partition(check.question)
            literals |= {"BEFORE": quote(before), "AFTER": quote(after)}
        text = source.joinpath(file).read_text(encoding="utf-8")
        for mark, value in {**marks, **literals}.items():
            text = text.replace(f"@{mark}@", value)
        write_text_atomically(folder / file, text)
        if file.endswith(".sh"):
            (folder / file).chmod(0o755)


def _quoted(text: str) -> str:
    """As a literal of Swift, whose escapes of quotes, backslashes, tabs and ends of lines are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _kotlin(text: str) -> str:
    """As a literal of Kotlin, where a dollar begins a template."""
    return _quoted(text).replace("$", "\\$")
