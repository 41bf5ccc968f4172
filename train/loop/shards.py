"""Load models under FSDP without a rank that holds a whole one.

The model is built on the meta device and sharded. Each rank then reads its rows of every tensor from the .safetensors
files, which are mapped into memory. One of N ranks holds 4 P / N bytes of P parameters, and one stored tensor.
GGUF files, folders of other tools, adapters, self-chats and random weights need the whole model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedTokenizerBase

from ..compute.distributed import Parallel, fill
from ..compute.loss import frozen_copy
from ..config.sections import TrainConfig
from ..data.documents import SELF_CHAT
from ..model.irregular import architecture_of, make_buffers
from ..model.source import load_source, load_tokenizer, shape_model, weights_folder
from ..model.stored_tensors import parameters_of
from .request import data_specs


def load_for_ranks(
    config: TrainConfig, parallel: Parallel, name: str, called: str = ""
) -> tuple[Any, PreTrainedTokenizerBase, Path | None]:
    """Return (model, its tokenizer, its folder) of `name`, the source or the teacher of a run.

    With a folder, the model is on the meta device and `read_shards` fills it. Without one, it is whole.
    """
    needs_whole = config.source.init == "random" or config.foreign.adapter
    needs_whole = needs_whole or any(spec.path == SELF_CHAT for spec in data_specs(config))
    folder = weights_folder(name, called) if parallel.mode == "fsdp" and not needs_whole else None
    if folder is None:
        return *load_source(name, called, config.foreign), None
    return shape_model(folder, called or f"--source {name}"), load_tokenizer(name), folder


def is_without_memory(model: Any) -> bool:
    """Tell whether a model is on the meta device."""
    return all(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def read_shards(model: Any, folder: Path | None, device: torch.device, parallel: Parallel) -> None:
    """Give a sharded model on the meta device memory on `device`, and fill it with this rank's rows of a folder.

    Without a folder the values are undefined, for a checkpoint to fill.
    """
    model.to_empty(device=device)
    model.tie_weights()  # `to_empty` gives a tied head memory of its own
    make_buffers(model)
    # buffers are no shards: they stay on the device of the products also when parameters are kept in host memory
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(parallel.device))
    if folder is not None:
        for name, value in parameters_of(folder, architecture_of(model.config)):
            fill(model.get_parameter(name), value)


def sharded_teacher(original: Any, folder: Path | None, dtype: torch.dtype, parallel: Parallel) -> Any:
    """Return a frozen copy of a model of `load_for_ranks` in `dtype`, with sharded layers.

    Embedding, head and last norm are whole on every rank.
    """
    teacher = frozen_copy(original, dtype, torch.device("meta") if folder is not None else parallel.device)
    for layer in teacher.model.layers:
        fully_shard(layer)
    layers = {parameter for layer in teacher.model.layers for parameter in layer.parameters()}
    fully_shard(teacher.model, ignored_params={each for each in teacher.parameters() if each not in layers})
    if folder is not None:
        read_shards(teacher, folder, parallel.device, parallel)
    return teacher
