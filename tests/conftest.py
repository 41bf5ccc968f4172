"""A tiny tokenizer, corpus and checkpoints, shared by all tests."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tiny import tiny_architecture, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from efficientllm.export import cli
from efficientllm.export.verification import sample_text
from efficientllm.runtime.base.command import run_command
from efficientllm.train.evaluation.quality import measure, sets
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.model.irregular import save_checkpoint

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


pytest_plugins = ["skips"]

MAX_WORKERS = 4
"""A worker takes up to 3 GB in the tests that lower a model for ExecuTorch."""


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means."""
    return min(available_cores(), MAX_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    if "EFFICIENTLLM_CACHE" not in os.environ:  # what tests find out about their files is theirs; children inherit it
        cache = tempfile.TemporaryDirectory(prefix="efficientllm-tests-")
        config.add_cleanup(cache.cleanup)
        os.environ["EFFICIENTLLM_CACHE"] = cache.name
    if workers := getattr(config.option, "numprocesses", None):
        # workers and their children inherit it: threads of two processes on one core wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // workers)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first where there are workers, so that none is left with one when the others are done."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="session")
def small_quality_sets() -> Iterator[None]:
    """Runs measure quality on two documents of a kind, two chats and two questions."""
    small = {kind: documents[:2] for kind, documents in sets.texts().items()}
    with (
        mock.patch.object(measure, "texts", return_value=small),
        mock.patch.object(measure, "chats", return_value=sets.chats()[:2]),
        mock.patch.object(measure, "facts", return_value=sets.facts()[:2]),
    ):
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with SmolLM's pre-tokenizer, 400 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([sample_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def save_tiny(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """save_tiny(architecture, **settings) -> folder of a saved tiny model."""

    def save(architecture: Architecture, **settings: Any) -> Path:
        folder = tmp_path / "checkpoint"
        save_checkpoint(tiny_model(architecture, **settings), tokenizer, folder)
        return folder

    return save


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 200 short documents."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = [line for line in sample_text().splitlines() if line.strip()]
    rows = [{"text": f"Document {index}. {lines[index % len(lines)]}"} for index in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A plain tiny Llama to prune: 3 layers, 4 heads over 2 key/value heads, FFN 128."""
    folder = tmp_path_factory.mktemp("source")
    save_checkpoint(tiny_model(tiny_architecture(layers=(LayerShape(4, 2, 128),) * 3)), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def artefact(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny unequal model, exported to an F32 GGUF."""
    folder = tmp_path_factory.mktemp("artefact")
    save_checkpoint(tiny_model(tiny_architecture()), tokenizer, folder / "checkpoint")
    arguments = [str(folder / "checkpoint"), "--target", "gguf", "--quantize", "f32", "--output", str(folder / "gguf")]
    assert run_command(cli.body, arguments) == 0
    return folder / "gguf"
