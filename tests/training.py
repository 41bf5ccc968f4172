"""Runs of `efficientllm-train` on a tiny source, and reading what they leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from efficientllm.runtime.base.command import run_command
from efficientllm.train import cli

SETTINGS = [
    *("--sequence-length", "32", "--eval-tokens", "256", "--held-out-fraction", "0.2", "--tokens", "2560"),
    *("--batch-size", "4", "--threads", "1", "--dtype", "float32", "--learning-rate", "1e-3"),
    *("--width-multiple", "2", "--target-ratio", "0.6", "--prune", "attention,ffn,stem", "--checkpoint-every", "5"),
    "--no-quality",
]
"""20 steps that remove something in most."""


def command(source: Path, corpus: Path, output: Path, *more: str) -> list[str]:
    return ["--source", str(source), "--data", str(corpus), "--output", str(output), *SETTINGS, *more]


def without(arguments: list[str], name: str) -> list[str]:
    """Arguments less one flag and its value."""
    index = arguments.index(name)
    return arguments[:index] + arguments[index + 2 :]


def run(arguments: Sequence[str]) -> int:
    return run_command(cli.body, arguments)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without wall times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")
