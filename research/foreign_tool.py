"""Run a pruning tool's own script on the CPU, and keep the fp32 logits of the model that it saves.

`python research/foreign_tool.py OUT TEXT SCRIPT ARGS...` runs in the tool's environment, whose torch and transformers
may be old. CUDA devices become the CPU, data sets of a hub become the text file TEXT, and half precision is used only
for what the tool saves. A pickled {"model", "tokenizer"} is also written with save_pretrained. Commands:
research/log/2026-11-28-checkpoints-of-real-tools.md.
"""

from __future__ import annotations

import copy
import os
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import datasets  # pyright: ignore[reportMissingImports]
import numpy as np
import torch

OUT, TEXT, SCRIPT = sys.argv[1:4]


class Texts(list):
    """Documents that tools read by number, by a slice and by the name of a column."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [each["text"] for each in self]
        found = super().__getitem__(key)
        return Texts(found) if isinstance(key, slice) else found


def load_dataset(*_: Any, **__: Any) -> Texts:
    text = Path(TEXT).read_text(encoding="utf-8")[:600_000]
    return Texts({"text": text[at : at + 6000]} for at in range(0, len(text) - 6000, 6000))


def on_cpu(function: Any) -> Any:
    """Return the function with the CPU for every CUDA device among its arguments."""

    def replaced(value: Any) -> Any:
        return "cpu" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value

    return lambda *args, **named: function(
        *map(replaced, args), **{name: replaced(value) for name, value in named.items()}
    )


def keep_logits(model: Any) -> None:
    """Write the logits of 40 tokens. half() has rounded the rotary tables, which no file stores: they are made anew."""
    whole = copy.deepcopy(model).float().eval()
    for module in whole.modules():
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            channels = torch.arange(0, 2 * len(module.inv_freq), 2).float() / (2 * len(module.inv_freq))
            module.inv_freq = 1.0 / (getattr(whole.config, "rope_theta", None) or 10000.0) ** channels
            if hasattr(module, "cos_cached"):
                angles = torch.outer(torch.arange(module.cos_cached.shape[-2]).float(), module.inv_freq)
                angles = torch.cat([angles, angles], -1).view(module.cos_cached.shape)
                module.cos_cached, module.sin_cached = angles.cos(), angles.sin()
    tokens = torch.randint(3, 400, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = whole(tokens, use_cache=False).logits[0]
    np.save(Path(OUT) / "tokens.npy", tokens.numpy())
    np.save(Path(OUT) / "expected.npy", logits.numpy())


def main() -> None:
    from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(SCRIPT).resolve().parent))
    for name in ("lm_eval", *(f"lm_eval.{part}" for part in ("utils", "api", "models", "tasks", "evaluator"))):
        sys.modules[name] = MagicMock()
    for name in ("api.instance", "api.model", "api.registry", "models.utils"):
        sys.modules[f"lm_eval.{name}"] = MagicMock()
    datasets.load_dataset = load_dataset
    kinds: tuple[Any, ...] = (torch.nn.Module, torch.Tensor)
    for kind in kinds:
        kind.to, kind.cuda = on_cpu(kind.to), lambda self, *_, **__: self
    torch.cuda.empty_cache = torch.cuda.synchronize = lambda *_: None
    for name in ("zeros", "ones", "arange", "tensor", "full", "empty"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tokenizers: Any = AutoTokenizer
    tokenizers.from_pretrained = lambda folder, **_: PreTrainedTokenizerFast.from_pretrained(folder)
    models: Any = PreTrainedModel
    load, save, pickle = models.from_pretrained.__func__, models.save_pretrained, torch.save

    def load_exact(cls: Any, *args: Any, **named: Any) -> Any:
        named.pop("device_map", None)
        return load(cls, *args, **{**named, "torch_dtype": torch.float32})

    def save_and_keep(self: Any, *args: Any, **named: Any) -> None:
        keep_logits(self)
        save(self, *args, **{"safe_serialization": True, **named})

    def pickle_and_save(value: Any, *args: Any, **named: Any) -> None:
        pickle(value, *args, **named)
        if isinstance(value, dict) and hasattr(value.get("model"), "save_pretrained"):
            value["model"].save_pretrained(OUT)
            value["tokenizer"].save_pretrained(OUT)
            sys.exit("saved")

    models.from_pretrained, models.save_pretrained = classmethod(load_exact), save_and_keep
    torch.save, torch.half = pickle_and_save, torch.float32
    os.makedirs(OUT, exist_ok=True)
    runpy.run_path(SCRIPT, run_name="__main__")


if __name__ == "__main__":
    main()
