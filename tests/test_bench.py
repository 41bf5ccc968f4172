from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_architecture

from efficientllm.devices import cli
from efficientllm.devices.local import Figure
from efficientllm.export import cli as export_cli
from efficientllm.runtime.command import run_command

QUICK = ["--prompt-tokens", "16", "--decode-tokens", "4", "--repetitions", "2", "--rounds", "2", "--threads", "1"]


def test_measures_artefacts_and_bare_files(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = save_tiny(tiny_architecture()), tmp_path / "gguf"
    training = {
        "tokens": 1000,
        "seconds": 2.5,
        "held_out_tokens": 64,
        "perplexity": {"source": 10.0, "after_pruning": 20.0, "final": 12.5},
    }
    (checkpoint / "training.json").write_text(json.dumps(training))
    arguments = [str(checkpoint), "--target", "gguf", "--quantize", "q8_0", "--output", str(output)]
    assert run_command(export_cli.body, arguments) == 0
    bare = output / "model.gguf"
    assert run_command(cli.body, [str(output), str(bare), *QUICK, "--json", str(tmp_path / "bench.json")]) == 0
    printed = capsys.readouterr()
    assert "held-out perplexity (64 tokens): source 10.00, after pruning 20.00, final 12.50" in printed.out
    rounds = [line for line in printed.err.splitlines() if line.startswith("round")]
    assert rounds == [f"round {turn}/2: {name}" for turn in (1, 2) for name in (output, bare)]  # they take turns
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    for result in results:
        assert result["prefill_tokens_per_second"]["n"] == 4
        assert result["decode_tokens_per_second"]["low"] <= result["decode_tokens_per_second"]["median"]
        assert result["peak_rss_bytes"] > result["baseline_rss_bytes"] > 10_000_000
        assert result["peak_rss_bytes"] >= result["rss_anon_bytes"] > 0
    assert results[0]["file_bytes"] == bare.stat().st_size
    assert results[1]["manifest"] == {}
    assert run_command(cli.body, [str(output), *QUICK, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| artefact | parameters |")


def test_figures_are_quartiles() -> None:
    assert Figure.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Figure(3.0, 2.0, 4.0, 5)
    assert Figure.of([7.0]) == Figure(7.0, 7.0, 7.0, 1)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli.body, [str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and then nothing")
    assert run_command(cli.body, [str(tmp_path / "bad.gguf"), *QUICK]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert run_command(cli.body, [str(tmp_path / "bad.gguf"), "--rounds", "0"]) == 2
    assert "--rounds 0: must be positive" in capsys.readouterr().err
