"""Import checkpoints that pruning tools made, export them, and compare every step with the tool's own model.

`python -m research.foreign_check FOLDER...` prints the cells of docs/import.md for folders of research/foreign_tool.py,
which has `tokens.npy` and `expected.npy`, the fp32 logits of the tool's model.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from efficientllm.export import cli
from efficientllm.export.gguf.probe import probe
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.train.model.source import load_source

TOP_1_TOKENS = 500


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


def cells(folder: Path, scratch: Path) -> Iterator[str]:
    """Yield the differences of the import and of f32 files, and the top-1 of llama.cpp with an f16 file."""
    tokens, expected = np.load(folder / "tokens.npy"), np.load(folder / "expected.npy")
    model = load_source(str(folder))[0].eval()
    longer = torch.randint(3, 400, (1, TOP_1_TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        imported = model(torch.from_numpy(tokens)).logits[0].numpy()
        ours = model(longer).logits[0].numpy()
    yield f"{largest(imported, expected):.1e}"
    for target, flags in (
        ("gguf", ["--quantize", "f16"]),
        ("onnx", ["--quantize", "f32"]),
        ("executorch", ["--quantize", "f32"]),
    ):
        output = scratch / target
        if run_command(cli.body, [str(folder), "--target", target, *flags, "--output", str(output)]):
            yield "refused"
        elif target == "gguf":
            found = probe(output / "model.gguf", longer[0].tolist(), []).logits[0]
            yield f"{100 * float((found.argmax(1) == ours.argmax(1)).mean()):.1f} %"
        else:
            engine = load_engine(output, EngineOptions(threads=1, context=128))
            rows = [engine.prefill(tokens[0, :24].tolist()), *(engine.decode(int(token)) for token in tokens[0, 24:])]
            engine.close()
            yield f"{largest(np.stack(rows), expected[23:]):.1e}"


def main() -> None:
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            for cell in cells(Path(name), Path(scratch)):
                print(f"{name}: {cell}", flush=True)


if __name__ == "__main__":
    main()
