"""What a run shows of itself: the first line, downloads, speed, the held-out loss along the run, the card."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_architecture
from training import command, expect_equal_weights, metrics, run

from efficientllm.runtime.base import progress
from efficientllm.runtime.base.command import is_main_process, run_command
from efficientllm.runtime.base.errors import ModelError
from efficientllm.runtime.base.progress import PROGRESS_LOGGER, ProgressDisplay
from efficientllm.train.config.sections import SourceConfig, TrainConfig
from efficientllm.train.model import source
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.reporting import model_card as cards
from efficientllm.train.reporting.metrics import Throughput
from efficientllm.train.reporting.model_card import model_card


def test_the_held_out_loss_along_a_run_changes_nothing_else(
    straight: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    assert run(command(source_folder, corpus, tmp_path / "measured", "--eval-every", "8")) == 0
    records = metrics(tmp_path / "measured")
    along = [record for record in records if "held_out_loss" in record]
    assert [(record["step"], record["tokens"]) for record in along] == [(8, 1024), (16, 2048)]
    assert [record for record in records if record not in along] == metrics(straight)
    expect_equal_weights(tmp_path / "measured", straight)
    source, end = (
        next(each[name] for each in records if name in each) for name in ("perplexity_source", "perplexity_final")
    )
    assert math.log(source) > along[0]["held_out_loss"] > along[1]["held_out_loss"] > math.log(end)


def test_the_speed_equals_that_of_the_last_minute() -> None:
    speed = Throughput()
    assert speed.tokens_per_second == 0.0
    for seconds in [30.0] * 4 + [10.0] * 6:  # the slow steps are over a minute ago
        speed.add(1000, seconds)
    assert speed.tokens_per_second == 100.0


@pytest.mark.slow
def test_the_first_line_comes_before_anything_is_loaded(tmp_path: Path) -> None:
    """Also before torch; a second is what a person waits without a doubt, the interpreter's own start included."""
    source = tmp_path / "damaged.gguf"
    source.write_bytes(b"GGUF")
    arguments = [sys.executable, "-m", "efficientllm.runtime.start", "train", "--source", str(source)]
    arguments += ["--prune", "none", "--output", str(tmp_path / "run")]
    began = time.monotonic()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"loading {source}, to train on demo\n"
        first = time.monotonic() - began
        process.communicate()
    assert time.monotonic() - began > 2 * first  # what follows takes longer, on a busy machine too


def test_repeated_task_has_its_own_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, PROGRESS_LOGGER)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = ProgressDisplay()
    for began in (0, 1000):
        for done in (1, 2, 4):
            now[0] = began + 20 * done
            display.update("fit", done, 5)
    assert caplog.messages == ["fit: 1/5", "fit: 2/5  ETA 1:00", "fit: 4/5  ETA 0:20"] * 2


def test_one_process_of_several_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that torchrun starts, that of rank 0."""
    logger = logging.getLogger("efficientllm")

    def body(argv: Sequence[str]) -> int:
        logger.getChild("train").info("model: runs/small")
        return 0

    level = logger.level
    for rank, said in (("1", ""), ("0", "model: runs/small\n")):
        monkeypatch.setenv("RANK", rank)
        assert is_main_process() == (rank == "0")
        assert run_command(body, []) == 0
        assert capsys.readouterr().out == said
    logger.setLevel(level)


def test_downloads_are_seen_in_a_terminal(
    source_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "hub_answers", lambda kind, name: True)
    from_pretrained = source.AutoConfig.from_pretrained
    monkeypatch.setattr(source.AutoConfig, "from_pretrained", lambda name, **_: from_pretrained(source_folder))

    def download(name: str, allow_patterns: list[str]) -> None:
        assert name == "owner/name"
        assert "model-*.safetensors" in allow_patterns
        print("100%", file=sys.stderr)
        raise OSError("that is all")

    monkeypatch.setattr(source, "snapshot_download", download)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(ModelError, match="that is all"):
        source.load_source("owner/name")
    assert capsys.readouterr().err == "100%\n"


def card(settings: SourceConfig) -> str:
    architecture = tiny_architecture()
    figures: dict[str, Any] = {"held_out_tokens": 1, "perplexity": {}, "tokens": 1, "data": ["x"], "seconds": 1.0}
    figures |= asdict(cards.source_card(settings.source))
    return model_card(replace(TrainConfig(), source=settings), figures, architecture, architecture)


def test_card_names_hub_sources_and_no_local_path(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    local = card(SourceConfig("models/tiny", (str(corpus), "demo")))
    assert "base_model" not in local
    assert "datasets" not in local
    assert str(corpus.parent) not in local
    assert f"--data {corpus.name} " in local
    assert f"over 1 tokens of text: 50% {corpus.name.partition('.')[0]}, 50% Wikipedia summaries (" in local
    (tmp_path / "models" / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(cards, "_hub_file", lambda name: tmp_path / "models" / "tiny" / "README.md")
    hub = card(SourceConfig("owner/model", ("owner/data@en:0.5", "demo")))
    assert "text: 33% owner/data@en, 67% Wikipedia summaries (" in hub
    assert "base_model: owner/model\ndatasets: [owner/data]\n" in hub
    assert "license: mit\n" in hub
    assert "The source's licence, mit, applies." in card(SourceConfig("models/tiny"))
    demo = card(SourceConfig("demo"))
    assert "license: apache-2.0\n" in demo
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in demo


@pytest.mark.parametrize(
    "text", ["", "no header", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\nlicense: 1\n---\n"]
)
def test_a_card_of_anybody_ends_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert cards.source_card(str(tmp_path)) == cards.SourceCard()


def test_card_names_the_release_of_transformers() -> None:
    figures: dict[str, Any] = {"held_out_tokens": 1, "perplexity": {}, "tokens": 1, "data": ["x"], "seconds": 1.0}
    plain = tiny_architecture(layers=(LayerShape(4, 2, 64),) * 2)
    needed = "Layers of their own width need transformers 5.14 or newer."
    assert needed in model_card(TrainConfig(), figures, plain, tiny_architecture())
    assert needed not in model_card(TrainConfig(), figures, plain, plain)
