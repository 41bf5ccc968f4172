"""`efficientllm-fit`: propose the best file of a source within a budget of bytes and time, from measured files."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ...runtime.base import flags
from ...runtime.base.errors import UsageError
from ...runtime.base.extras import extra
from ...runtime.base.model_names import check_source
from ...runtime.base.quantities import format_bytes
from ...runtime.engines.manifest import cache_bytes
from ...runtime.latency.profile import DeviceProfile
from ...runtime.latency.shape import Workload
from ..config.pruning import SIZES_FILE, PruneConfig
from ..model.architecture import Architecture
from ..model.file_types import gguf_bytes, tokenizer_bytes
from ..model.folder_files import read_json
from ..reporting.model_card import command_line
from .points import Point, Recipe

FRONT = "front.jsonl"
"""Measured files of SmolLM2-135M-Instruct, as the study writes them; shipped with the package."""

MEASURED_SOURCES = ("demo", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""Names of the model that the shipped front was measured with."""

STEP = 0.98
"""Ratio between two sizes that are tried against --max-ms."""

PROCESS_BYTES = 115_000_000
"""Python with the libraries of the engine, and the engine's buffers for passes of up to 512 tokens."""
TOKEN_BYTES = 280
"""Tables and buffers of the engine for each token of the vocabulary."""
SAME_FILE = 0.03
"""Largest relative difference of bytes between a planned file and an exported one of the same type."""


@dataclass(frozen=True)
class FitConfig:
    """Fit."""

    max_bytes: int | None = flags.byte_count(None)
    """Largest file, such as 60MB."""
    max_ms: float | None = flags.number(None, above=0)
    """Longest time of --workload on the device of --device-profile, in milliseconds."""
    max_memory: int | None = flags.byte_count(None)
    """Largest peak memory of a process that serves the file, such as 120MB (for a run with --sizes)."""
    bench: str = ""
    """File of efficientllm-bench --json with measured memory. Without it, or for sizes that it lacks, memory is
    estimated with a cache for the tokens of --workload."""
    device_profile: str = ""
    """Latency profile of the device of --max-ms, written by efficientllm-bench --profile."""
    workload: str = "depth=512"
    """Workload: prompt=256,answer=128 (tokens) for a whole answer, depth=512 for one token after 512."""
    front: str = ""
    """Measured files of the study; default: the shipped ones of SmolLM2-135M-Instruct."""
    tokens: int = flags.count(30_720)
    """Training tokens of the proposed run."""
    learning_rate: float = flags.number(3e-4, above=0)
    """Peak learning rate of the proposed run. The shipped files used the default; larger models need less."""
    output: str = "fitted"
    """Folder of the proposed file; its run is in OUTPUT-run."""

    def __post_init__(self) -> None:
        flags.check_fields(self)
        is_pair = (self.max_ms is None) == (not self.device_profile)
        flags.require(self, "max_ms", is_pair, "--max-ms and --device-profile FILE go together")
        is_used = not self.bench or self.max_memory is not None
        flags.require(self, "bench", is_used, "applies only to --max-memory; set it")
        _ = Workload.parse(self.workload)


@dataclass(frozen=True)
class Measured:
    """A measured file."""

    point: Point
    file_bytes: int
    kl: float


@dataclass(frozen=True)
class Proposal:
    """A proposed file of a source."""

    point: Point
    file_bytes: float
    kl: float
    """KL in nats per token, interpolated between two measured files at this share of the whole file's bytes."""
    ms: float | None = None


def read_front(path: str) -> list[Measured]:
    """Read the measured files. Raises UsageError if the file is missing, of another kind, or without a whole model."""
    try:
        file = Path(path) if path else resources.files("efficientllm.train.planning").joinpath(FRONT)
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        front = [Measured(Point.parse(line["point"]), int(line["file_bytes"]), float(line["kl"])) for line in lines]
    except OSError as error:
        raise UsageError(f"--front {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--front {path}: not a front of the study: {error}") from error
    if not families(front):
        raise UsageError(f"--front {path}: no file of the whole model; measure one for each type")
    return front


def families(front: Iterable[Measured]) -> list[list[Measured]]:
    """Group measured files that differ only in the pruned size, largest first. The first of each is the whole model."""
    found: dict[tuple[str, str, str, bool], list[Measured]] = {}
    for each in front:
        point = each.point
        training = "qat" if point.training == "qat" else ""
        found.setdefault((point.kind, point.head, training, point.importance), []).append(each)
    ordered = [sorted(family, key=lambda each: -each.file_bytes) for family in found.values()]
    return [family for family in ordered if family[0].point.target_bytes is None]


def kl_at(family: Sequence[Measured], share: float) -> float | None:
    """Return the KL at a share of the whole file's bytes, interpolated; None beyond the smallest file."""
    whole = family[0].file_bytes
    for larger, smaller in itertools.pairwise(family):
        high, low = larger.file_bytes / whole, smaller.file_bytes / whole
        if low <= share <= high and high > low:
            return smaller.kl + (larger.kl - smaller.kl) * (share - low) / (high - low)
    return family[0].kl if share >= 1 else None


def propose(
    shape: Architecture,
    vocabulary: int,
    front: Iterable[Measured],
    max_bytes: float,
    ms_of: Callable[[Point, float], float | None],
    max_ms: float | None = None,
) -> Proposal | None:
    """Return the file of least KL within the budget, or None if no family reaches it.

    `ms_of` predicts the time of a point pruned to a number of bytes, or None if pruning does not reach it.
    """
    best: Proposal | None = None
    for family in families(front):
        point, whole = family[0].point, _whole_bytes(family, shape, vocabulary)
        size = min(whole, max_bytes)
        while (kl := kl_at(family, size / whole)) is not None:
            is_whole = size >= whole
            target = replace(point, target_bytes=None if is_whole else int(size), training=point.training or "train")
            candidate = point if is_whole else target
            ms = ms_of(candidate, size) if max_ms is not None else None
            if max_ms is None or (ms is not None and ms <= max_ms):
                if best is None or kl < best.kl:
                    best = Proposal(candidate, size, kl, ms)
                break
            size *= STEP
    return best


def least_bytes(shape: Architecture, vocabulary: int, front: Iterable[Measured]) -> float:
    """Return the bytes of the smallest file that `propose` can name."""
    shares = ((family, family[-1].file_bytes / family[0].file_bytes) for family in families(front))
    return min(share * _whole_bytes(family, shape, vocabulary) for family, share in shares)


def _whole_bytes(family: Sequence[Measured], shape: Architecture, vocabulary: int) -> float:
    """Return the bytes of the whole model's file in the types of a family."""
    point = family[0].point
    return float(gguf_bytes(shape, point.kind, vocabulary, point.head, point.head))


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


@dataclass(frozen=True)
class MeasuredFile:
    """A file that efficientllm-bench measured."""

    shape: Architecture
    num_bytes: float
    memory: ServingMemory


def read_bench(path: str) -> list[MeasuredFile]:
    """Return the GGUF files in a file of efficientllm-bench --json. Raises UsageError if it is none."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        return [
            MeasuredFile(
                Architecture.from_dict(result["manifest"]["architecture"]),
                float(result["file_bytes"]),
                ServingMemory(float(result["peak_rss_bytes"]), float(result["kv_cache_bytes"]), True),
            )
            for result in results
            if result["engine"] == "llama.cpp" and result["manifest"]
        ]
    except OSError as error:
        raise UsageError(f"--bench {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--bench {path}: not a file of efficientllm-bench --json") from error


def serving_memory(
    shape: Architecture, file_bytes: float, workload: Workload, measured: Iterable[MeasuredFile]
) -> ServingMemory:
    """Return the largest memory measured of a file, or an estimate with a cache for the tokens of a workload."""
    found = [
        each.memory for each in measured if each.shape == shape and abs(each.num_bytes / file_bytes - 1) <= SAME_FILE
    ]
    tokens = workload.first_depth + workload.answer_tokens
    return max(found, key=lambda memory: memory.num_bytes, default=estimate_memory(shape, file_bytes, tokens))


def commands(source: str, config: FitConfig, point: Point) -> list[str]:
    """Return the commands that make the proposed file."""
    run = f"{config.output}-run"
    lines = []
    if point.training:
        recipe = Recipe(source, tokens=config.tokens, learning_rate=config.learning_rate)
        lines.append(command_line(recipe.train_config(point, run)))
    checkpoint = run if point.training else source
    words = ["efficientllm-export", checkpoint, "--target", "gguf", *point.export_flags, "--output", config.output]
    return [*lines, shlex.join(words)]


def _timer(
    shape: Architecture, profile: DeviceProfile | None, config: FitConfig
) -> Callable[[Point, float], float | None]:
    """Return a function that predicts the time of a pruned point in the type of the profile.

    It assumes the ranking that keeps the most bytes per group.
    """
    if profile is None:
        return lambda point, size: None
    from ..pruning.measures import DeviceTime
    from ..pruning.selection import SelectionRules, select_removal, smallest_architecture
    from .targets import group_sizes

    time = DeviceTime(profile, Workload.parse(config.workload)).measure
    rules = SelectionRules(PruneConfig().kinds, 32)
    least = smallest_architecture(shape, rules)

    def ms_of(point: Point, size: float) -> float | None:
        if point.kind != profile.measured_on.quantization:
            return None  # other kernels, which nobody timed
        if point.target_bytes is None:
            return time.of(shape)
        whole = gguf_bytes(shape, point.kind, 0, point.head, point.head)
        gone = max(0.0, 1 - size / whole) * shape.num_parameters
        if shape.num_parameters - gone < least.num_parameters:
            return None
        return time.of(select_removal(shape, group_sizes(shape, rules), rules, shape.num_parameters - gone).after)

    return ms_of


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        FitConfig,
        prog="efficientllm-fit",
        examples=("fit demo --max-bytes 62MB", "fit demo --max-bytes 80MB --max-ms 20 --device-profile phone.json"),
        description="Propose the best file of a source for a budget of bytes, and of time, by measured files.",
    )
    parser.add_argument(
        "source",
        help="Hugging Face folder or hub id, .gguf file, 'demo', or a run with --sizes: its best size is named",
    )
    return parser


def body(argv: Sequence[str]) -> int:
    arguments = build_parser().parse(argv)
    source = arguments.pop("source")
    config = flags.take(arguments, FitConfig)
    if (Path(source) / "config.toml").is_file():  # of a run: other folders need no import of torch here
        with extra("train"):
            from ..sizes import has_sizes
        if has_sizes(Path(source)):
            return _fit_run(Path(source), config)
    if config.max_memory is not None:
        raise UsageError(f"--max-memory: {source} is no finished run with --sizes; give --max-bytes")
    if config.max_bytes is None:
        raise UsageError("--max-bytes is missing; give the largest file, such as 60MB")
    check_source(source, source)
    front = read_front(config.front)
    profile = DeviceProfile.load(Path(config.device_profile)) if config.device_profile else None
    if profile is not None:
        profile.check(engine="llama.cpp")
    shape, vocabulary = _read(source)
    if source not in MEASURED_SOURCES and not config.front:
        print("measured on another model, SmolLM2-135M-Instruct: measure a --front of your own to be sure")
    found = propose(shape, vocabulary, front, config.max_bytes, _timer(shape, profile, config), config.max_ms)
    if found is None:
        limit = format_bytes(config.max_bytes) + (f" and {config.max_ms:g} ms" if config.max_ms is not None else "")
        least = format_bytes(least_bytes(shape, vocabulary, front))
        raise UsageError(f"{source}: no measured file fits into {limit}; the smallest has {least}; raise the budget")
    pruned = "pruned" if found.point.target_bytes else "whole"
    trained = ", trained on its grid" if found.point.training == "qat" else ""
    weighed = ", rounded by an importance matrix" if found.point.importance else ""
    time = f", {found.ms:.2f} ms predicted" if found.ms is not None else ""
    print(f"{pruned}, {found.point.kind}{trained}{weighed}: {format_bytes(found.file_bytes)}{time}")
    where = f"{found.point} of " + ("the front" if config.front else "SmolLM2-135M's front")
    print(f"KL from the source by {where}: {found.kl:.3f} nats per token\n")
    print("\n".join(commands(source, config, found.point)))
    return 0


def _fit_run(run: Path, config: FitConfig) -> int:
    """Print the best trained size of a run within the limits, and the command that exports it.

    The best one has the highest score of the job, or the lowest held-out perplexity without one. Of equal ones it is
    the smallest.
    """
    if config.max_bytes is None and config.max_ms is None and config.max_memory is None:
        raise UsageError("--max-bytes, --max-ms or --max-memory is missing; give the largest file, time or memory")
    time, workload = None, Workload.parse(config.workload)
    with extra("train"):
        from ..pruning.measures import DeviceTime
        from ..sizes import check_sizes_are_finished, members_of
    check_sizes_are_finished(run)
    if config.device_profile:
        profile, (kind, _) = DeviceProfile.load(Path(config.device_profile)), members_of(run)[0].file_types
        profile.check(engine="llama.cpp", quantization=kind)
        time = DeviceTime(profile, workload).measure
    measured = read_bench(config.bench) if config.bench else []
    rows = read_json(run / SIZES_FILE)["sizes"]
    found: list[tuple[float, dict[str, Any], str]] = []
    for row in reversed(rows):  # smallest first
        shape, size = Architecture.from_folder(run / row["folder"] / "model"), row["bytes"]
        ms = time.of(shape) if time is not None else None
        memory = serving_memory(shape, size, workload, measured) if config.max_memory and size is not None else None
        memory_bytes = memory.num_bytes if memory else None
        is_small = _is_within(size, config.max_bytes) and _is_within(memory_bytes, config.max_memory)
        if not (is_small and _is_within(ms, config.max_ms)):
            continue
        shown = [format_bytes(size)] if size is not None else []
        shown += [f"{ms:.2f} ms predicted"] if ms is not None else []
        shown += [memory.describe()] if memory is not None else []
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


def _read(source: str) -> tuple[Architecture, int]:
    """Return (shape, bytes of the tokenizer in a file) of a source."""
    with extra("train"):
        from ..model.irregular import architecture_of
        from ..model.source import load_source, load_tokenizer, shape_of_gguf
    if (shape := shape_of_gguf(source)) is not None:
        return shape, tokenizer_bytes(load_tokenizer(source, "source"))
    model, tokenizer = load_source(source, source)
    return architecture_of(model.config), tokenizer_bytes(tokenizer)
