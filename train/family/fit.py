"""`efficientllm-fit`: name the best size of a run with --sizes within a budget of bytes, time and memory."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.extras import extra
from ...runtime.base.quantities import format_bytes
from ...runtime.engines.manifest import cache_bytes
from ...runtime.latency.profile import DeviceProfile
from ...runtime.latency.shape import Workload
from ..checkpoint.run_folder import SIZES_FOLDER
from ..config.pruning import SIZES_FILE
from ..model.architecture import Architecture
from ..model.folder_files import read_json

PROCESS_BYTES = 115_000_000
"""Python with the libraries of the engine, and the engine's buffers for passes of up to 512 tokens."""
TOKEN_BYTES = 280
"""Tables and buffers of the engine for each token of the vocabulary."""


@dataclass(frozen=True)
class FitConfig:
    """Fit."""

    max_bytes: int | None = flags.byte_count(None)
    """Largest file, such as 60MB."""
    max_ms: float | None = flags.number(None, above=0)
    """Longest time of --workload on the device of --device-profile, in milliseconds."""
    max_memory: int | None = flags.byte_count(None)
    """Largest memory of a process that serves the file, such as 120MB, estimated with a cache for the tokens of
    --workload."""
    device_profile: str = ""
    """Latency profile of the device of --max-ms, written by efficientllm-bench --profile."""
    workload: str = "depth=512"
    """Workload: prompt=256,answer=128 (tokens) for a whole answer, depth=512 for one token after 512."""
    output: str = "fitted"
    """Folder of the exported file."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        is_pair = (self.max_ms is None) == (not self.device_profile)
        flags.require(self, "max_ms", is_pair, "--max-ms and --device-profile FILE go together")
        _ = Workload.parse(self.workload)


def serving_memory(shape: Architecture, file_bytes: float, workload: Workload) -> float:
    """Estimate the bytes of a process for one context of the workload: file, fp16 cache, and the rest of the process.

    PROCESS_BYTES and TOKEN_BYTES cover the largest of four measured files (docs/training.md).
    """
    heads = sum(layer.num_key_value_heads for layer in shape.layers)
    cache = cache_bytes(workload.first_depth + workload.answer_tokens, heads, shape.head_dim, 2)
    return file_bytes + cache + PROCESS_BYTES + TOKEN_BYTES * shape.vocab_size


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        FitConfig,
        prog="efficientllm-fit",
        examples=("fit runs/sizes --max-bytes 45MB", "fit runs/sizes --max-ms 20 --device-profile phone.json"),
        description="Name the best size of a run with --sizes within a budget of bytes, time and memory.",
    )
    parser.add_argument("run", help="--output of efficientllm-train --sizes")
    return parser


def body(argv: Sequence[str]) -> int:
    """Print the best trained size of a run within the limits, and the command that exports it.

    The best one has the highest score of the job, or the lowest held-out perplexity without one. Of equal ones it is
    the smallest.
    """
    arguments = build_parser().parse(argv)
    run, config = Path(arguments.pop("run")), flags.take(arguments, FitConfig)
    if not (run / SIZES_FOLDER).is_dir() and not (run / SIZES_FILE).is_file():
        raise UsageError(f"{run} is no run with --sizes; give the --output of efficientllm-train --sizes")
    if config.max_bytes is None and config.max_ms is None and config.max_memory is None:
        raise UsageError("--max-bytes, --max-ms or --max-memory is missing; give the largest file, time or memory")
    time, workload = None, Workload.parse(config.workload)
    with extra("train"):
        from ..pruning.measures import DeviceTime
        from .sizes import check_sizes_are_finished, members_of
    check_sizes_are_finished(run)
    if config.device_profile:
        profile, (kind, _) = DeviceProfile.load(Path(config.device_profile)), members_of(run)[0].file_types
        profile.check(engine="llama.cpp", quantization=kind)
        time = DeviceTime(profile, workload).measure
    rows = read_json(run / SIZES_FILE)["sizes"]
    found: list[tuple[float, dict[str, Any], str]] = []
    for row in reversed(rows):  # smallest first
        shape, size = Architecture.from_folder(run / row["folder"] / "model"), row["bytes"]
        ms = time.of(shape) if time is not None else None
        memory = serving_memory(shape, size, workload) if config.max_memory and size is not None else None
        is_small = _is_within(size, config.max_bytes) and _is_within(memory, config.max_memory)
        if not (is_small and _is_within(ms, config.max_ms)):
            continue
        shown = [format_bytes(size)] if size is not None else []
        shown += [f"{ms:.2f} ms predicted"] if ms is not None else []
        shown += [f"{format_bytes(memory)} of memory (estimated)"] if memory is not None else []
        shown += [f"score {row['score']:.3f}"] if row["score"] is not None else []
        shown += [f"perplexity {row['perplexity']:.2f}"]
        quality = row["score"] if row["score"] is not None else -row["perplexity"]
        found.append((quality, row, ", ".join(shown)))
    if not found:
        sizes = ", ".join(row["size"] for row in rows)
        raise UsageError(f"{run}: none of its sizes {sizes} is within the limits; raise them")
    _, best, shown = max(found, key=lambda each: each[0])
    others = [f"{row['size']} ({described})" for _, row, described in reversed(found) if row is not best]
    print(f"size {best['size']}: {shown}")
    print(f"also within the limits: {'; '.join(others)}\n" if others else "")
    words = ["efficientllm-export", str(run / best["folder"]), "--target", "gguf", "--output", config.output]
    print(shlex.join(words))
    return 0


def _is_within(value: float | None, limit: float | None) -> bool:
    """Return True if there is no limit, or a known value that keeps it."""
    return limit is None or (value is not None and value <= limit)
