"""What a smaller cache costs in quality: `python tests/tools/cache_quality.py ARTEFACT TEXT`.

The artefact reads the text with an fp32 cache and with each other type; printed is how far the distributions of the
next token are from the fp32 cache's (KL divergence, nats), by depth, and the perplexity. A type's attention kernel is
the one that was measured to be fastest with it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from efficientllm.runtime.base import flags
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.quantities import markdown_table
from efficientllm.runtime.engines.engine import CacheChoice, EngineOptions, load_engine
from efficientllm.runtime.sampling import log_softmax

CACHES: tuple[CacheChoice, ...] = ("f16", "q8_0")
DEPTHS = (0, 256, 512, 1024, 1536, 2048)
"""Bounds of the ranges of positions that are shown apart."""


def log_probabilities(
    artefact: str, kv_cache: CacheChoice, text: str, threads: int
) -> tuple[list[int], np.ndarray, str]:
    """Tokens of the text, fp16 log-probabilities [n, V] after each, and what the engine ran with."""
    options = EngineOptions(threads=threads, context=DEPTHS[-1], kv_cache=kv_cache)
    engine = load_engine(artefact, options)
    tokens = engine.tokenize(text, special=False)[: DEPTHS[-1]]
    if len(tokens) < DEPTHS[-1]:
        raise UsageError(f"the text has {len(tokens)} tokens; {DEPTHS[-1]} are needed")
    rows = [log_softmax(logits).astype(np.float32) for logits in engine.evaluate(tokens, 0)]
    engine.close()
    return tokens, np.concatenate(rows), engine.settings


def row(name: str, tokens: Sequence[int], exact: np.ndarray, found: np.ndarray) -> list[str]:
    """One line of the table."""
    divergence = (np.exp(exact) * (exact - found)).sum(axis=1)
    shown = [f"{divergence[low:high].mean():.1e}" for low, high in itertools.pairwise(DEPTHS)]
    same = (exact.argmax(axis=1) == found.argmax(axis=1)).mean()
    losses = -found[np.arange(len(tokens) - 1), tokens[1:]]
    return [name, *shown, f"{same:.2%}", f"{np.exp(losses.mean()):.4f}"]


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(prog="python tests/tools/cache_quality.py", description=__doc__)
    parser.add_argument("artefact", help=".gguf file or folder")
    parser.add_argument("text", help="a text of at least 2,048 tokens")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads [all]")
    arguments = parser.parse(argv)
    text = Path(arguments["text"]).read_text(encoding="utf-8")
    tokens, exact, settings = log_probabilities(arguments["artefact"], "f32", text, arguments["threads"])
    ranges = [f"KL, {low} to {high}" for low, high in itertools.pairwise(DEPTHS)]
    rows = [["cache", *ranges, "same argmax", "perplexity"], row(settings, tokens, exact, exact)]
    for kv_cache in CACHES:
        _, found, settings = log_probabilities(arguments["artefact"], kv_cache, text, arguments["threads"])
        rows.append(row(settings, tokens, exact, found))
    print(markdown_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
