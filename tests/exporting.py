"""Shapes, tokens and the one command that every test of an exporter starts with."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import UNEQUAL

from efficientllm.export import cli
from efficientllm.runtime.base.command import run_command
from efficientllm.train.model.architecture import LayerShape

TOKENS = torch.randint(3, 400, (40,), generator=torch.Generator().manual_seed(2)).tolist()

SHAPES = {
    "unequal": UNEQUAL,
    "odd FFN widths": (LayerShape(4, 2, 75), LayerShape(2, 1, 33), LayerShape(4, 4, 64)),
    "no attention in the first layer": (LayerShape(0, 0, 64), LayerShape(4, 2, 96)),
    "no attention in the middle": (LayerShape(4, 2, 96), LayerShape(0, 0, 64), LayerShape(2, 2, 64)),
    "no FFN": (LayerShape(4, 2, 64), LayerShape(4, 2, 0), LayerShape(2, 1, 0)),
    "an empty layer": (LayerShape(4, 2, 96), LayerShape(0, 0, 0), LayerShape(2, 1, 64)),
    "uniform": (LayerShape(4, 2, 96),) * 2,
}

EVERY_KIND = (
    LayerShape(0, 0, 64),  # no attention, in the first layer
    LayerShape(4, 2, 75),  # an odd FFN width
    LayerShape(0, 0, 0),  # nothing
    LayerShape(2, 1, 0),  # no FFN
    LayerShape(0, 0, 33),  # no attention in the middle
    LayerShape(4, 4, 64),
)
"""The kinds of layers of SHAPES in one model, where an export takes seconds a layer."""

EXACT = ("--quantize", "f32", "--max-context", "128")
"""Flags of an exact ExecuTorch program that several tests read."""


def export_f32(checkpoint: Path, output: Path | str, *more: str) -> int:
    """Export a GGUF in F32 without comparing it with torch, and return the exit code."""
    return export(checkpoint, "gguf", output, "--quantize", "f32", "--no-verify", *more)


def export(checkpoint: Path, target: str, output: Path | str, *more: str) -> int:
    """Exit code of `efficientllm-export`."""
    return run_command(cli.body, [str(checkpoint), "--target", target, "--output", str(output), *more])
