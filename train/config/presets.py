"""Presets of `efficientllm-train --preset NAME`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...runtime.base.quantities import unknown_name
from .pruning import PruneConfig
from .sections import OptimizerConfig, QuantisationConfig, RunConfig, SourceConfig, TrainConfig

SMOLLM_CORPUS = "HuggingFaceTB/smollm-corpus@fineweb-edu-dedup"


def cpu_quickstart() -> TrainConfig:
    """Return settings that prune SmolLM2-135M to 85 % on two CPU cores in ten minutes.

    With so few steps, all groups are removed in one event by the gradients of the first steps and refitted. Prices
    are measured on little text.
    """
    return TrainConfig(
        # without chats among the text, the model would forget to chat
        source=SourceConfig(data=("demo:0.7", "self-chat:0.3"), sequence_length=256, eval_tokens=8192),
        pruning=PruneConfig(
            prune=("attention", "ffn", "vocabulary"),  # vocabulary rows cost chats and facts the least
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
        source=SourceConfig(data=(), functions="learned", sequence_length=256, eval_tokens=4096),
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
            # only for `--prune layers` and the like, whose prices would otherwise take longer than the training
            block_tokens=1024,
            block_renewals=2,
        ),
        optimizer=OptimizerConfig(tokens=344_064, learning_rate=4e-4),
        run=RunConfig(quality=False),
        quantisation=QuantisationConfig(qat="q4_0", qat_start=0.75),
    )


def gpu24_1b() -> TrainConfig:
    """Return settings for Llama-3.2-1B to a half on one GPU of 24 GB, half a million tokens a step.

    Weights, gradients and bf16 moments take 12 bytes a parameter and the teacher 2. Not run on such a GPU yet.
    """
    return _llama(
        "meta-llama/Llama-3.2-1B",
        RunConfig(activation_checkpointing=True, checkpoint_every=100, tensorboard=True),
        tokens=1_000_000_000,
        batch_size=2,
        gradient_accumulation=128,
        optimizer_dtype="bfloat16",
    )


def node8_8b() -> TrainConfig:
    """Return settings for Llama-3.1-8B to a half on one node of eight 80 GB GPUs, half a million tokens a step.

    FSDP shards weights, gradients and moments. Start it with `torchrun --nproc-per-node 8 -m efficientllm.runtime.start
    train`. Not run on such a node yet.
    """
    return _llama(
        "meta-llama/Llama-3.1-8B",
        RunConfig(data_parallel="fsdp", activation_checkpointing=True, checkpoint_every=500, tensorboard=True),
        tokens=10_000_000_000,
        gradient_accumulation=8,
    )


def _llama(source: str, run: RunConfig, **optimizer: Any) -> TrainConfig:
    """Return the recipe of `recover` for long runs on GPUs, with four removals.

    The vocabulary stays, because the teacher would read other tokens, which the CPU makes.
    """
    recipe = recover()
    pruning = replace(recipe.pruning, prune=("attention", "ffn"), prune_start=0.05, prune_end=0.2, removals=4)
    return TrainConfig(
        source=SourceConfig(source=source, data=(SMOLLM_CORPUS,), sequence_length=2048, eval_tokens=262_144),
        pruning=replace(pruning, target_ratio=0.5),
        optimizer=replace(recipe.optimizer, **optimizer),
        run=run,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "cpu-quickstart": cpu_quickstart,
    "recover": recover,
    "job": job,
    "gpu24-1b": gpu24_1b,
    "node8-8b": node8_8b,
}


def preset(name: str) -> TrainConfig:
    """Return a preset by its name. Raises UsageError for an unknown one."""
    if name not in PRESETS:
        raise unknown_name("--preset", name, PRESETS)
    return PRESETS[name]()
