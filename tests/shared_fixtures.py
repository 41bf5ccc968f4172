"""A tiny tokenizer, corpus and checkpoints, shared by all tests.

A plugin that conftest.py loads where tests run.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import exporting
import pytest
import training
from forked import run_python
from shared import made_once
from tiny import tiny_architecture, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from efficientllm.devices import local
from efficientllm.export.gguf import probe, quantize
from efficientllm.export.verification import sample_text
from efficientllm.runtime.engines import engine as engine_module
from efficientllm.runtime.engines import tuning
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.llama_context import LlamaContext
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.train import run as run_module
from efficientllm.train.evaluation.quality import contract, sets
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.reporting import plots

Exported = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def plugins_read_once() -> Iterator[None]:
    """The entry points of all packages, which every export and every load asks for, are read once."""
    read_once = functools.cache(importlib.metadata.entry_points)
    with (
        mock.patch.object(importlib.metadata, "entry_points", read_once),
        mock.patch.object(engine_module, "entry_points", read_once),
    ):
        yield


@pytest.fixture(autouse=True, scope="session")
def forked_probes() -> Iterator[None]:
    """Exports check and quantise a GGUF in a forked process; commands that tests start as programs start one anew."""
    with mock.patch.object(probe, "run_python", run_python), mock.patch.object(quantize, "run_python", run_python):
        yield


PICTURES = ("plot_architecture", "plot_pruning")


@pytest.fixture(autouse=True, scope="session")
def empty_pictures() -> Iterator[None]:
    """Runs write empty pictures: to draw them takes as long as the rest of a tiny run."""

    def write_nothing(*arguments: Any) -> None:
        arguments[-1].write_bytes(b"")

    with mock.patch.multiple(run_module, **dict.fromkeys(PICTURES, write_nothing)):
        yield


@pytest.fixture
def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test draw their pictures."""
    for name in PICTURES:
        monkeypatch.setattr(run_module, name, getattr(plots, name))


@pytest.fixture(autouse=True, scope="session")
def small_quality_sets() -> Iterator[None]:
    """Runs measure quality on two documents of a kind, two chats and two questions."""
    small = {kind: documents[:2] for kind, documents in sets.texts().items()}
    with (
        mock.patch.object(contract, "texts", return_value=small),
        mock.patch.object(contract, "chats", return_value=sets.chats()[:2]),
        mock.patch.object(contract, "facts", return_value=sets.facts()[:2]),
    ):
        yield


@pytest.fixture(autouse=True, scope="session")
def first_attention() -> Iterator[Callable[[LlamaContext, int], list[float]]]:
    """llama.cpp's first attention that a model can have counts as the fastest: to measure takes longer than most tests.

    Yields what would measure. The machine counts as idle.
    """
    timed = tuning._attention_seconds
    with (
        mock.patch.object(tuning, "_attention_seconds", return_value=[1.0]),
        mock.patch.object(tuning, "is_busy", return_value=False),
        mock.patch.object(local, "is_busy", return_value=False),
    ):
        yield timed


@pytest.fixture
def unseen(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of an artefact that nothing is known of, in a cache that keeps what is found out at once."""
    folder = Path(shutil.copytree(artefact, tmp_path / "copied"))
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    monkeypatch.setattr("efficientllm.runtime.engines.file_cache.SETTLED_SECONDS", -1)
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture(autouse=True, scope="session")
def passes_of_all() -> Iterator[Callable[[LlamaContext, int, int], float]]:
    """llama.cpp's passes take the same time whatever they serve, so that every answer is in each: what is measured
    depends on the machine. Yields what would measure."""
    timed = tuning._pass_ms
    with mock.patch.object(tuning, "_pass_ms", return_value=1.0):
        yield timed


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


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

    def make(folder: Path) -> None:
        lines = [line for line in sample_text().splitlines() if line.strip()]
        rows = [{"text": f"Document {index}. {lines[index % len(lines)]}"} for index in range(200)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "text.jsonl").write_text(text, encoding="utf-8")

    return made_once(tmp_path_factory, "corpus", make) / "text.jsonl"


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A plain tiny Llama to prune: 3 layers, 4 heads over 2 key/value heads, FFN 128."""
    model = tiny_model(tiny_architecture(layers=(LayerShape(4, 2, 128),) * 3))
    return made_once(tmp_path_factory, "source", lambda folder: save_checkpoint(model, tokenizer, folder))


@pytest.fixture(scope="session")
def straight(source_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of training.SETTINGS: 20 steps."""

    def make(folder: Path) -> None:
        assert training.run(training.command(source_folder, corpus, folder / "run")) == 0

    return made_once(tmp_path_factory, "straight", make) / "run"


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Exported:
    """exported(target, *flags) -> folder of a tiny unequal model exported so; `checkpoint` lies beside it."""
    model = tiny_model(tiny_architecture(), max_position_embeddings=4096)

    def export(target: str, *flags: str) -> Path:
        def make(folder: Path) -> None:
            save_checkpoint(model, tokenizer, folder / "checkpoint")
            assert exporting.export(folder / "checkpoint", target, folder / target, *flags) == 0

        name = "-".join([target, *(flag.strip("-") for flag in flags)])
        return made_once(tmp_path_factory, name, make) / target

    return export


@pytest.fixture(scope="session")
def artefact(exported: Exported) -> Path:
    """The same in an F32 GGUF."""
    return exported("gguf", "--quantize", "f32")


@pytest.fixture(scope="module")
def engine(artefact: Path) -> Iterator[EngineScheduler]:
    """Load that artefact."""
    engine = load_engine(artefact, EngineOptions(threads=1))
    yield engine
    engine.close()
