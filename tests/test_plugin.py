"""The example plug-in of docs/architecture.md, installed: its criterion, its export target and its engine."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from training import SETTINGS

from efficientllm.runtime.base.child import ProcessResult, run

PLUGIN = Path(__file__).with_name("plugin")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the plug-in into."""
    source, site = tmp_path_factory.mktemp("plugin") / "source", tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, source)  # setuptools builds in the source folder
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index"]
    done = run([sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source)])
    assert done.code == 0, done.errors
    return site


def command(site: Path | None, *arguments: str) -> ProcessResult:
    path = os.pathsep.join([*([str(site)] if site else []), *sys.path])
    started = [sys.executable, "-m", "efficientllm.runtime.start", *arguments]
    return run(started, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.slow
def test_an_installed_criterion_target_and_engine_carry_a_model_all_the_way(
    site: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    source = ["--source", str(source_folder), "--data", str(corpus), "--output", str(tmp_path / "run")]
    done = command(site, "train", *source, *SETTINGS, "--saliency", "fourth-power")
    assert done.code == 0, done.errors
    assert json.loads((tmp_path / "run" / "model" / "training.json").read_text())["perplexity"]["final"] > 1
    export = ["--target", "bigram", "--half", "--output", str(tmp_path / "bigram")]
    done = command(site, "export", str(tmp_path / "run"), *export)
    assert done.code == 0, done.errors
    assert "bigram table, f16" in done.output
    done = command(site, "chat", str(tmp_path / "bigram"), "Hello", "--temperature", "1", "--seed", "1")
    assert done.code == 0, done.errors
    assert done.output.strip()


def test_its_flags_are_in_the_help_and_its_names_among_the_known(site: Path, source_folder: Path) -> None:
    done = command(site, "export", "--target", "bigram", "--help")
    assert "Store fp16 instead of fp32." in done.output
    output = [str(source_folder), "--target", "nothing", "--output", "unused"]
    assert command(site, "export", *output).last_error.endswith(
        "known: gguf, onnx, executorch, hf-uniform, web, android, ios, bigram"
    )
    assert "bigram" not in command(None, "export", *output).last_error
