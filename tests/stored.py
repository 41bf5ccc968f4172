"""Weights as hubs have them: in other types than fp32, in one file or several."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED_WAYS = [(dtype, shards) for shards in (1, 2) for dtype in STORED]
"""(type, number of files)"""


def store(folder: Path, dtype: torch.dtype, shards: int) -> None:
    """Rewrite a folder's weights in `dtype`, in as many files, with an index as transformers writes it."""
    single = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(single).items()}
    single.unlink()
    config = json.loads((folder / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config | {"dtype": name, "torch_dtype": name}))
    if shards == 1:
        save_file(tensors, single, metadata={"format": "pt"})
        return
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
