"""Collect statistics of the inputs of each matrix on calibration text, with the checkpoint in torch.

`column_importance` is llama.cpp's importance matrix, the mean square of each input. llama.cpp's Python bindings accept
one but cannot collect it. `input_grams` are the second moments for error-compensated rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.base.errors import DataError
from ..runtime.base.extras import extra
from ..train.model.tensors import same_input
from .checkpoint import Checkpoint

CALIBRATION_TOKENS = 16_384
WINDOW = 512
"""Tokens per forward pass."""


def column_importance(checkpoint: Checkpoint, text_path: str) -> dict[str, np.ndarray]:
    """Return {parameter name: mean square of each input, fp32 [in]} for every matrix.

    The inputs are those of the first tokens of a corpus. Raises DataError if the text has less than one window.
    """
    return _collect(checkpoint, text_path, lambda x: x.double().square().sum(0))


def input_grams(checkpoint: Checkpoint, text_path: str) -> dict[str, np.ndarray]:
    """Return {parameter name: X^T X / n of its inputs, fp32 [in, in]} for every matrix.

    Matrices with the same input share the array. Raises DataError as `column_importance`.
    """
    return _collect(checkpoint, text_path, lambda x: x.T @ x)


def _collect(checkpoint: Checkpoint, text_path: str, statistic: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    """Return the mean over tokens of `statistic`, a sum over the rows of inputs [n, in]."""
    with extra("train"):
        import torch

        from ..train.model.irregular import to_irregular
        from ..train.model.source import load_for_inference
    window = min(WINDOW, checkpoint.context_length)
    ids = _calibration_tokens(checkpoint, text_path, window)
    model: Any = to_irregular(load_for_inference(checkpoint.folder)).eval()
    readers = same_input(checkpoint.architecture.parts)
    sums: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name.endswith(tuple(readers)) or name == "lm_head":
            module.register_forward_pre_hook(_observer(name, sums, statistic))
    count = len(ids) // window
    with torch.inference_mode():
        for index in range(count):
            window_ids = ids[index * window : (index + 1) * window]
            model(torch.tensor([window_ids]), use_cache=False)
    num_tokens = count * window
    means = {name: (total / num_tokens).float().numpy() for name, total in sums.items()}
    return _spread(means, readers, checkpoint)


def _calibration_tokens(checkpoint: Checkpoint, text_path: str, window: int) -> list[int]:
    """Return the first CALIBRATION_TOKENS ids of a corpus. Raises DataError for fewer than `window`."""
    with extra("train"):
        from ..train.data.documents import DataSpec, open_texts
    ids: list[int] = []
    for text in open_texts(DataSpec(text_path, flag="--calibrate")):
        ids += checkpoint.tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= CALIBRATION_TOKENS:
            break
    if len(ids) < window:
        raise DataError(f"--calibrate {text_path}: {len(ids)} tokens are too few; give at least {window}")
    return ids[:CALIBRATION_TOKENS]


def _observer(
    name: str, sums: dict[str, Any], statistic: Callable[[Any], Any]
) -> Callable[[Any, tuple[Any, ...]], None]:
    def observe(module: Any, arguments: tuple[Any, ...]) -> None:
        value = statistic(arguments[0].flatten(0, -2))
        sums[name] = value if name not in sums else sums[name].add_(value)

    return observe


def _spread(
    means: dict[str, np.ndarray], same: dict[str, tuple[str, ...]], checkpoint: Checkpoint
) -> dict[str, np.ndarray]:
    """Return the observations under parameter names, one for every matrix with the same input."""
    result: dict[str, np.ndarray] = {}
    for name, value in means.items():
        observed = next((matrix for matrix in same if name.endswith(matrix)), "")
        readers = same[observed] if observed else ("",)  # the head's input is its own
        result |= {f"{name.removesuffix(observed)}{reader}.weight": value for reader in readers}
    if checkpoint.architecture.tie_word_embeddings:  # the file has one matrix, whose products are the head's
        result["model.embed_tokens.weight"] = result.pop("lm_head.weight")
    return result


def save_for_gguf(
    importance: dict[str, np.ndarray],
    rename: Callable[[str], str],
    pad: Callable[[str, np.ndarray], np.ndarray],
    path: Path,
) -> None:
    """Write {GGUF tensor name: importance} as .npz. `pad` gives zero importance to padded columns."""
    arrays = {rename(name): pad(name, value).astype(np.float32) for name, value in importance.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]
