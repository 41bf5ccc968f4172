"""Logits of Hugging Face folders by the transformers or the mlx-lm of whichever Python runs this, without efficientllm.

python tests/tools/other_reader.py ROOT

ROOT/tokens.npy holds token ids [B, S]; each folder of ROOT is a model. Beside its files comes logits.npy [B, S, V], or
refusal.txt with the last line of what was raised; ROOT/reader.txt says who read.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class WithoutEfficientLLM:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "efficientllm":
            raise ModuleNotFoundError(name)


def read_with_mlx() -> tuple[str, Callable[[Path, np.ndarray], np.ndarray]]:
    import mlx.core as mx  # type: ignore[import-not-found]
    from mlx_lm import __version__  # type: ignore[import-not-found]
    from mlx_lm.models.cache import make_prompt_cache  # type: ignore[import-not-found]
    from mlx_lm.utils import load_model  # type: ignore[import-not-found]

    mx.set_default_device(mx.cpu)

    def read(folder: Path, tokens: np.ndarray) -> np.ndarray:
        model: Any = load_model(folder, trust_remote_code=True)[0]
        found = np.array(model(mx.array(tokens)).astype(mx.float32))
        cache, places = make_prompt_cache(model), [0, 7, 17, *range(18, tokens.shape[1] + 1)]
        pieces = [
            model(mx.array(tokens[:, begin:end]), cache=cache).astype(mx.float32)
            for begin, end in itertools.pairwise(places)
        ]
        cached = np.array(mx.concatenate(pieces, axis=1))
        assert np.abs(cached - found).max() < 1e-4, "with its cache, mlx-lm gives other logits"
        return cached

    return f"mlx-lm {__version__}", read


def read_with_transformers() -> tuple[str, Callable[[Path, np.ndarray], np.ndarray]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    def read(folder: Path, tokens: np.ndarray) -> np.ndarray:
        assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False).encode("A small model.")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.inference_mode():
            begun = model(torch.from_numpy(tokens[:, :7]), use_cache=True)
            ended = model(torch.from_numpy(tokens[:, 7:]), past_key_values=begun.past_key_values, use_cache=True)
        return torch.cat([begun.logits, ended.logits], 1).float().numpy()

    return f"transformers {__version__}", read


def main(root: Path) -> None:
    sys.meta_path.insert(0, WithoutEfficientLLM())  # type: ignore[arg-type]
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    name, read = read_with_mlx() if importlib.util.find_spec("mlx_lm") else read_with_transformers()
    (root / "reader.txt").write_text(name)
    tokens = np.load(root / "tokens.npy")
    for config in sorted(root.glob("*/config.json")):
        folder = config.parent
        try:
            np.save(folder / "logits.npy", read(folder, tokens))
        except Exception as error:
            (folder / "refusal.txt").write_text(str(error).strip().splitlines()[-1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
