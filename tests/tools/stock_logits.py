"""Read logits from exported folders with stock runtimes. No code of the exporters or of our engines has a part in it.

Every function takes the folder, the tokens and the sizes of the passes. It yields (positions, logits fp32 [P, V]).
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Rows = Iterator[tuple[list[int], np.ndarray]]


def _pieces(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of pieces of `sizes`, repeated, that cover `count` tokens."""
    start = 0
    for size in itertools.cycle(sizes):
        yield start, min(start + size, count)
        start += size
        if start >= count:
            return


def _gguf(folder: Path, tokens: list[int], chunks: Sequence[int]) -> Rows:
    """Run llama.cpp in passes of the chunks' first size, and in one pass."""
    import llama_cpp

    for size in (chunks[0], len(tokens)):
        path = str(folder / "model.gguf")
        model = llama_cpp.Llama(path, n_ctx=256, n_batch=size, n_ubatch=size, logits_all=True, verbose=False)
        model.eval(tokens)
        yield list(range(len(tokens))), np.array(model.scores[: len(tokens)])
        model.close()


def _onnx(folder: Path, tokens: list[int], chunks: Sequence[int]) -> Rows:
    """Run onnxruntime in the chunks, and in a padded batch of two with a step after it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    caches = {value.name: value for value in session.get_inputs()[2:]}
    names = [value.name for value in session.get_outputs()]

    def call(rows: list[list[int]], mask: list[list[int]], past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        feeds: dict[str, Any] = {"input_ids": np.array(rows), "attention_mask": np.array(mask)}
        for name, value in caches.items():
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            feeds[name] = past.get(name, np.zeros((len(rows), value.shape[1], 0, value.shape[3]), dtype))
        outputs: dict[str, Any] = dict(zip(names, session.run(names, feeds), strict=True))
        logits = outputs.pop("logits")[:, 0]
        return logits, {name.replace("present", "past_key_values"): each for name, each in outputs.items()}

    ends, rows, past = [], [], {}
    for start, end in _pieces(len(tokens), chunks):
        logits, past = call([tokens[start:end]], [[1] * end], past)
        ends.append(end - 1)
        rows.append(logits[0])
    yield ends, np.stack(rows)
    short, whole = len(tokens) // 3, len(tokens) - 1
    mask = [[1] * short + [0] * (whole - short), [1] * whole]
    first, past = call([tokens[:short] + [0] * (whole - short), tokens[:whole]], mask, {})
    second, _ = call([[tokens[short]], [tokens[whole]]], [[*row, 1] for row in mask], past)
    yield [short - 1, whole - 1, short, whole], np.concatenate([first, second])


def _executorch(folder: Path, tokens: list[int], chunks: Sequence[int]) -> Rows:
    """Run ExecuTorch in the chunks, and token by token after one pass of half of the tokens."""
    for name in ("extension.pybindings.portable_lib", "runtime", "extension.llm.custom_ops.custom_ops"):
        importlib.import_module(f"executorch.{name}")
    importlib.import_module("executorch.kernels.quantized")  # XNNPACK fails if it is first
    from executorch.runtime import Runtime

    half = len(tokens) // 2
    for sizes in (chunks, (half, *[1] * half)):
        method: Any = Runtime.get().load_program(folder / "model.pte").load_method("forward")
        ends, rows = [], []
        for start, end in _pieces(len(tokens), sizes):
            (logits,) = method.execute((torch.tensor([tokens[start:end]]), torch.tensor([start])))
            ends.append(end - 1)
            rows.append(logits.reshape(-1).float().numpy().copy())
        yield ends, np.stack(rows)


READERS: dict[str, Callable[[Path, list[int], Sequence[int]], Rows]] = {
    "gguf": _gguf,
    "onnx": _onnx,
    "executorch": _executorch,
}
"""Target -> its runtime."""
