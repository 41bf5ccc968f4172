"""Print the bytes that loading a model for training adds to the peak of each rank: `python -m rank_memory FOLDER 0|1`.

One process holds the whole model. The ranks of a torchrun hold their shards, and with 1 those of a bf16 teacher too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from efficientllm.train.compute.distributed import Parallel
from efficientllm.train.compute.loss import TrainingLoss, frozen_copy
from efficientllm.train.config.sections import OptimizerConfig, SourceConfig, TrainConfig
from efficientllm.train.shards import load_for_ranks, read_shards, sharded_teacher

CPU = torch.device("cpu")


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def load(source: str, distills: bool, parallel: Parallel) -> TrainingLoss:
    """Load a model, and with `distills` its teacher, as `run._make_trainer` does."""
    config = TrainConfig(source=SourceConfig(source=source), optimizer=OptimizerConfig(distill=float(distills)))
    model, _, folder = load_for_ranks(config, parallel, source)
    teacher = None
    if distills and parallel.mode == "fsdp":
        teacher = sharded_teacher(model, folder, torch.bfloat16, parallel)
    elif distills:
        teacher = frozen_copy(model, torch.bfloat16, CPU)
    loss = TrainingLoss(model, torch.float32, teacher=teacher)
    parallel.wrap(loss)
    if folder is not None:
        read_shards(model, folder, CPU, parallel)
    return loss


def main() -> None:
    source, distills = sys.argv[1], sys.argv[2] == "1"
    parallel = Parallel("fsdp", CPU)
    load(str(Path(source) / "small"), distills, parallel)  # everything is imported, and the ranks are connected
    parallel.barrier()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is that from here on
    loss = load(str(Path(source) / "large"), distills, parallel)
    added = parallel.gather(status("VmHWM") - before)
    if parallel.is_main:
        print(json.dumps({"added": added, "parameters": loss.model.num_parameters()}))
    parallel.close()


if __name__ == "__main__":
    main()
