"""Random models as the artefacts that ship: what is timed is what our exporters write, padding and all.

devices imports no exporter: efficientllm-export runs in a child process, as a user would call it.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from ...runtime.base.child import run_python
from ...runtime.base.errors import DeviceError
from ...runtime.base.files import json_text
from ...runtime.engines.artefact import Artefact
from ...runtime.latency.shape import DecoderShape
from .checkpoint import write_checkpoint

TARGETS = {"llama.cpp": "gguf", "onnxruntime": "onnx", "executorch": "executorch"}
"""Engine -> the exporter of its artefacts."""
DEFAULT_TYPES = {"llama.cpp": "q4_0", "onnxruntime": "int4", "executorch": "8da4w"}
"""Engine -> the weight type that is measured where none is asked for."""
EXPORT = "from efficientllm.export.cli import main; main()"
AT_ONCE = 2
"""Exports that run beside each other."""


def make_artefacts(
    shapes: Sequence[DecoderShape],
    engine: str,
    quantization: str,
    context: int,
    folder: Path,
    say: Callable[[str], None],
) -> list[Artefact]:
    """An artefact of every shape below `folder`, in order; those that are there already are taken as they are.

    DeviceError with the exporter's own line where it refuses.
    """

    def make(shape: DecoderShape) -> Artefact:
        text = json_text({"shape": asdict(shape), "engine": engine, "type": quantization, "context": context})
        place = folder / f"{quantization}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if not place.exists():
            say(f"exporting {describe(shape)}")
            _export(shape, TARGETS[engine], quantization, context, place)
        return Artefact.open(place)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(make, shapes))


def _export(shape: DecoderShape, target: str, quantization: str, context: int, place: Path) -> None:
    source = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".source", dir=place.parent))
    try:
        write_checkpoint(shape, source, context)
        flags = ["--target", target, "--quantize", quantization, "--no-verify", "--output", str(place)]
        done = run_python("-c", EXPORT, str(source), *flags)
    finally:
        shutil.rmtree(source, ignore_errors=True)
    if done.code:
        raise DeviceError(f"exporting {describe(shape)}: {done.last_error.removeprefix('error: ')}")


def describe(shape: DecoderShape) -> str:
    """A random model in a few words."""
    last = shape.layers[-1]
    return (
        f"a random model: hidden {shape.hidden_size}, {len(shape.layers)} layers, the last of "
        f"{last.num_attention_heads}/{last.num_key_value_heads} heads and FFN {last.intermediate_size}"
    )
