"""Print the bytes that loading a model for training adds to the peak of each rank: `python -m rank_memory FOLDER`.

One process holds the whole model and a teacher in bf16. The ranks of a torchrun hold their shards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from efficientllm.train.compute.distributed import Parallel
from efficientllm.train.compute.loss import TrainingLoss, frozen_copy
from efficientllm.train.config.sections import OptimizerConfig, SourceConfig, TrainConfig
from efficientllm.train.loop.shards import load_for_ranks, read_shards, sharded_teacher

CPU = torch.device("cpu")


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def load(source: str, parallel: Parallel) -> TrainingLoss:
    """Load a model and its teacher as `run._make_trainer` does."""
    config = TrainConfig(source=SourceConfig(source=source), optimizer=OptimizerConfig(distill=1.0))
    model, _, folder = load_for_ranks(config, parallel, source)
    if parallel.mode == "fsdp":
        teacher = sharded_teacher(model, folder, torch.bfloat16, parallel)
    else:
        teacher = frozen_copy(model, torch.bfloat16, CPU)
    loss = TrainingLoss(model, torch.float32, teacher=teacher)
    parallel.wrap(loss)
    if folder is not None:
        read_shards(model, folder, CPU, parallel)
    return loss


def main() -> None:
    source, parallel = sys.argv[1], Parallel("fsdp", CPU)
    load(str(Path(source) / "small"), parallel)  # everything is imported, and the ranks are connected
    parallel.barrier()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is that from here on
    loss = load(str(Path(source) / "large"), parallel)
    added = parallel.gather(status("VmHWM") - before)
    if parallel.is_main:
        print(json.dumps({"added": added, "parameters": loss.model.num_parameters()}))
    parallel.close()


if __name__ == "__main__":
    main()
