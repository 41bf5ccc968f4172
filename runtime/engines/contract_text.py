"""Format the quality contract of manifests and training.json as a table and as a sentence.

`train/evaluation/quality` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALL_TEXTS = "all texts"
"""Name of the geometric mean over the kinds of text, each with the same weight."""
BITS_PER_BYTE = "bits per byte, all texts (other tokens: perplexities are per token of the source)"
"""Row of the table for models with different vocabularies."""


def contract_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the contract as a table, with a header and a row for each figure."""
    rows = [["quality", "source", "this model", "ratio"]]
    for kind, each in found["texts"].items():
        rows.append([f"perplexity, {kind}", *_cells(each)])
    if "bits_per_byte" in found:
        bits = found["bits_per_byte"]
        cells = [f"{bits['reference']:.4f}", f"{bits['bits_per_byte']:.4f}"]
        rows.append([BITS_PER_BYTE, *cells, f"{bits['bits_per_byte'] / bits['reference']:.3f}"])
    if "chat_answers" in found:
        rows.append(["perplexity, chat answers", *_cells(found["chat_answers"])])
        end = found["end_of_turn"]
        change = f"{end['difference']:+.2f} ± {end['difference_stderr']:.2f} nats"
        rows.append(["end of the turn, nats", f"{end['reference']:.2f}", f"{end['nats']:.2f}", change])
    if "questions" in found:
        asked = found["questions"]
        kept = f"{asked['kept']} of the source's {asked['reference']}"
        rows.append([f"right of {asked['asked']} questions", str(asked["reference"]), str(asked["right"]), kept])
    return rows


def _cells(each: Mapping[str, float]) -> list[str]:
    ratio = f"{each['ratio']:.3f} ± {each['ratio_stderr']:.3f}"
    return [f"{each['reference']:.2f}", f"{each['perplexity']:.2f}", ratio]


def one_line(found: Mapping[str, Any]) -> str:
    """Return the contract as a sentence."""
    every = found["texts"][ALL_TEXTS]
    parts = [f"perplexity x{every['ratio']:.2f} over {len(found['texts']) - 1} kinds of text"]
    if "chat_answers" in found:
        parts.append(f"x{found['chat_answers']['ratio']:.2f} on chat answers")
    if "questions" in found and found["questions"]["reference"]:
        parts.append(f"{found['questions']['kept']} of {found['questions']['reference']} questions still right")
    return ", ".join(parts)
