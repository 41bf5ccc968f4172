"""Peak memory of a process that serves a GGUF: measured by efficientllm-bench, or else estimated.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.base.errors import UsageError
from ...runtime.base.quantities import format_bytes
from ...runtime.engines.manifest import cache_bytes
from ...runtime.latency.shape import Workload
from ..model.architecture import Architecture

PROCESS_BYTES = 115_000_000
"""Python with the libraries of the engine, and the engine's buffers for passes of up to 512 tokens."""
TOKEN_BYTES = 280
"""Tables and buffers of the engine for each token of the vocabulary."""
SAME_FILE = 0.03
"""Largest relative difference of bytes between a planned file and an exported one of the same type."""


@dataclass(frozen=True)
class ServingMemory:
    """Peak memory of a process that serves one file."""

    num_bytes: float
    cache: float
    """Part of `num_bytes` in the KV cache."""
    is_measured: bool

    def describe(self) -> str:
        """Return the bytes in words, with their origin and the cache that they include."""
        origin = "measured" if self.is_measured else "estimated, not measured"
        return f"{format_bytes(self.num_bytes)} of memory ({origin}, with a cache of {format_bytes(self.cache)})"


def estimate_memory(shape: Architecture, file_bytes: float, tokens: int) -> ServingMemory:
    """Return the memory for one context of `tokens`: file, fp16 cache, and the rest of the process.

    PROCESS_BYTES and TOKEN_BYTES cover the largest of four measured files (docs/training.md).
    """
    heads = sum(layer.num_key_value_heads for layer in shape.layers)
    cache = cache_bytes(tokens, heads, shape.head_dim, 2)
    return ServingMemory(file_bytes + cache + PROCESS_BYTES + TOKEN_BYTES * shape.vocab_size, cache, False)


def read_bench(path: str) -> list[dict[str, Any]]:
    """Return the results of a file of efficientllm-bench --json. Raises UsageError if it has none."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        return [result for result in results if result["engine"] == "llama.cpp" and result["manifest"]]
    except OSError as error:
        raise UsageError(f"--bench {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--bench {path}: not a file of efficientllm-bench --json") from error


def measured_memory(shape: Architecture, file_bytes: float, results: Iterable[dict[str, Any]]) -> ServingMemory | None:
    """Return the largest memory measured of a file of this shape and size, or None if nothing was measured."""
    found = [
        ServingMemory(result["peak_rss_bytes"], result["kv_cache_bytes"], True)
        for result in results
        if abs(result["file_bytes"] / file_bytes - 1) <= SAME_FILE
        and Architecture.from_dict(result["manifest"]["architecture"]) == shape
    ]
    return max(found, key=lambda memory: memory.num_bytes, default=None)


def serving_memory(
    shape: Architecture, file_bytes: float, workload: Workload, results: Iterable[dict[str, Any]]
) -> ServingMemory:
    """Return the measured memory of a file, or an estimate with a cache for the tokens of a workload."""
    tokens = workload.first_depth + workload.answer_tokens
    return measured_memory(shape, file_bytes, results) or estimate_memory(shape, file_bytes, tokens)
