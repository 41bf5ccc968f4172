"""Print the seeded loss of a tiny run and the SHA-256 of a tiny model in four formats.

`python tests/tools/fingerprint.py FOLDER [TARGET ...]` makes the inputs in FOLDER when they are missing, so that two
commits read the same ones. A change that must not alter behaviour prints the same lines before and after.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TARGETS = {
    "gguf": ("gguf", "--quantize", "q8_0"),
    "gguf-q4_0": ("gguf", "--quantize", "q4_0"),
    "onnx": ("onnx", "--quantize", "int8"),
    "executorch": ("executorch", "--quantize", "8da4w", "--max-context", "128"),
}
"""Flags of `efficientllm-export`."""
WEIGHTS = (".gguf", ".onnx", ".data", ".pte")
RUNS = {
    "paper": ("--prune", "attention,ffn,stem", "--target-ratio", "0.6"),
    "recover": (
        *("--prune", "attention,ffn,blocks", "--target-ratio", "0.6", "--saliency", "token-fisher", "--distill", "1"),
        *("--recover", "least-squares", "--recover-tokens", "256", "--removals", "2", "--block-tokens", "256"),
    ),
}


def make_inputs(folder: Path) -> None:
    """Write a tiny source, an irregular checkpoint and a corpus."""
    program = f"""
import sys; sys.path[:0] = [{str(TESTS)!r}]
import json, pathlib
from tiny import tiny_architecture, tiny_model, tiny_tokenizer
from efficientllm.export.verification import sample_text
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.irregular import save_checkpoint
folder = pathlib.Path({str(folder)!r})
tokenizer = tiny_tokenizer()
save_checkpoint(tiny_model(tiny_architecture(layers=(LayerShape(4, 2, 128),) * 3)), tokenizer, folder / "source")
save_checkpoint(tiny_model(tiny_architecture()), tokenizer, folder / "irregular")
lines = [line for line in sample_text().splitlines() if line.strip()]
rows = [json.dumps({{"text": f"Document {{index}}. {{lines[index % len(lines)]}}"}}) + "\\n" for index in range(200)]
(folder / "text.jsonl").write_text("".join(rows), encoding="utf-8")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def run(command: str, *arguments: str) -> None:
    """Run a command on one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "efficientllm.runtime.start", command, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"efficientllm-{command} {' '.join(arguments)}: {done.stderr[-2000:]}")


def print_loss(folder: Path, name: str) -> None:
    """Print the last loss and a hash of all losses and removals of a seeded run."""
    output = folder / f"run-{name}"
    settings = (
        *("--sequence-length", "32", "--eval-tokens", "256", "--held-out-fraction", "0.2", "--tokens", "2560"),
        *("--batch-size", "4", "--threads", "1", "--dtype", "float32", "--learning-rate", "1e-3", "--no-quality"),
        *("--width-multiple", "2", "--overwrite", "--output", str(output)),
    )
    run("train", "--source", str(folder / "source"), "--data", str(folder / "text.jsonl"), *settings, *RUNS[name])
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [(record["loss"], record["grad_norm"], record.get("removed")) for record in records if "loss" in record]
    weights = hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()
    print(f"{name}: loss {told[-1][0]!r}, {len(told)} steps {hashlib.sha256(repr(told).encode()).hexdigest()}")
    print(f"{name}: model {weights}")


def print_export(folder: Path, name: str) -> None:
    """Print the SHA-256 of each file of weights that an export writes."""
    target, *flags = TARGETS[name]
    output = folder / f"export-{name}"
    checkpoint = str(folder / "irregular")
    run("export", checkpoint, "--target", target, *flags, "--overwrite", "--output", str(output))
    for file in sorted(path for path in output.rglob("*") if path.name.endswith(WEIGHTS)):
        print(f"{name}: {file.relative_to(output)} {hashlib.sha256(file.read_bytes()).hexdigest()}")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text.jsonl").exists():
        make_inputs(folder)
    for name in sys.argv[2:] or [*RUNS, *TARGETS]:
        (print_loss if name in RUNS else print_export)(folder, name)


if __name__ == "__main__":
    main()
