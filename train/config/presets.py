"""Presets of `efficientllm-train --preset NAME`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...runtime.base.quantities import unknown_name
from .pruning import PruneConfig
from .quantisation import QuantisationConfig
from .sections import OptimizerConfig, RunConfig, SourceConfig, TrainConfig

SMOLLM_CORPUS = "HuggingFaceTB/smollm-corpus@fineweb-edu-dedup"


def cpu_quickstart() -> TrainConfig:
    """Return settings that prune SmolLM2-135M to 85 % on two CPU cores in ten minutes.

    With so few steps, all groups are removed in one event by the gradients of the first steps and refitted. The
    source's own chats are 30 % of the text, so that the model keeps chatting. Vocabulary rows come first, because they
    cost chats and facts the least. Their prices are measured on little text.
    """
    return TrainConfig(
        source=SourceConfig(data=("demo:0.7", "self-chat:0.3"), sequence_length=256, eval_tokens=8192),
        pruning=PruneConfig(
            prune=("attention", "ffn", "vocabulary"),
            target_ratio=0.85,
            saliency="token-fisher",
            prune_start=0.1,
            prune_end=0.1,
            recover="least-squares",
            block_tokens=1024,
            block_renewals=2,
        ),
        optimizer=OptimizerConfig(tokens=61_440, batch_size=2, distill=1.0),
        run=RunConfig(checkpoint_every=100),
    )


def recover() -> TrainConfig:
    """Return the settings that lost the least at -20 % in our trials (research/log).

    Heads, FFN channels and vocabulary rows are ranked by `token-fisher` and removed in one event after a fifth of the
    tokens, with a least-squares fit, distillation and a cosine schedule.
    """
    return TrainConfig(
        pruning=PruneConfig(
            prune=("attention", "ffn", "vocabulary"),
            saliency="token-fisher",
            prune_start=0.2,
            prune_end=0.2,
            recover="least-squares",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, lr_schedule="cosine", distill=1.0),
    )


def job() -> TrainConfig:
    """Return the settings for one job: 40 MB in q4_0 from SmolLM2-135M, from chats or examples in --data.

    The vocabulary shrinks after the first step. The whole model then learns the job for a third of the tokens. Heads
    and FFN channels are removed in three events, and the rest is trained on the grid of q4_0.
    """
    return TrainConfig(
        source=SourceConfig(functions="learned", sequence_length=256, eval_tokens=4096),
        pruning=PruneConfig(
            prune=("attention", "ffn", "vocabulary"),
            target_bytes=40_000_000,
            saliency="token-fisher",
            vocabulary_rows=8192,
            vocabulary_tokens=300_000,
            prune_start=0.35,
            prune_end=0.55,
            removals=3,
            recover="least-squares",
            recover_tokens=4096,
        ),
        optimizer=OptimizerConfig(tokens=196_608, learning_rate=4e-4),
        run=RunConfig(quality=False),
        quantisation=QuantisationConfig(qat="q4_0", qat_start=0.75),
    )


def gpu24_469m() -> TrainConfig:
    """Return settings for SmolLM-1.7B to 469M on one GPU of 24 GB and 32 GB of host memory.

    The recipe is that of `recover`, with eight removals as so much is removed, and the whole vocabulary. A step has
    half a million tokens. Weights, gradients and AdamW's moments take 16 bytes a parameter, 27 GB at the start. They
    stay in host memory, and layers move to the GPU for every microbatch, so microbatches are large (start it with
    `torchrun --nproc-per-node 1 -m efficientllm.train.cli`). Not run on such a GPU yet. The paper's 469M model saw 50B
    tokens.
    """
    return _smollm_1_7b(
        pruning={
            "prune": ("attention", "ffn", "stem"),
            "target_params": 469_000_000,
            "prune_end": 0.25,
            "removals": 8,
        },
        optimizer={"tokens": 5_000_000_000, "batch_size": 8, "gradient_accumulation": 32},
        run=RunConfig(
            data_parallel="fsdp", offload=True, activation_checkpointing=True, checkpoint_every=500, tensorboard=True
        ),
    )


def node8_1b() -> TrainConfig:
    """Return settings for SmolLM-1.7B to 1.1B on one node of eight 80 GB GPUs, a million tokens a step.

    The recipe is that of `recover` with four removals. It keeps the vocabulary. Otherwise the teacher would read other
    tokens, which the CPU makes. It uses 50B tokens as in the paper. Start it with `torchrun --nproc-per-node 8 -m
    efficientllm.train.cli`. Not run on such a node yet.
    """
    return _smollm_1_7b(
        pruning={"prune": ("attention", "ffn"), "target_params": 1_100_000_000, "prune_end": 0.2, "removals": 4},
        optimizer={"tokens": 50_000_000_000, "batch_size": 8, "gradient_accumulation": 8},
        run=RunConfig(data_parallel="ddp", activation_checkpointing=True, checkpoint_every=1000, tensorboard=True),
    )


def _smollm_1_7b(pruning: dict[str, Any], optimizer: dict[str, Any], run: RunConfig) -> TrainConfig:
    """Return the recipe of `recover` for SmolLM-1.7B with these changes. Removals begin after 5 % of the tokens."""
    recipe = recover()
    return TrainConfig(
        source=SourceConfig(
            source="HuggingFaceTB/SmolLM-1.7B", data=(SMOLLM_CORPUS,), sequence_length=2048, eval_tokens=262_144
        ),
        pruning=replace(recipe.pruning, prune_start=0.05, **pruning),
        optimizer=replace(recipe.optimizer, learning_rate=3e-4, **optimizer),
        run=run,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "cpu-quickstart": cpu_quickstart,
    "recover": recover,
    "job": job,
    "gpu24-469m": gpu24_469m,
    "node8-1b": node8_1b,
}


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise unknown_name("--preset", name, PRESETS)
    return PRESETS[name]()
