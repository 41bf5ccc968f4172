"""The study of one job: the commands of its arms, its order and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efficientllm.train import cli
from efficientllm.train.evaluation.evaluate import Evaluation
from efficientllm.train.evaluation.jobs import JobResult
from research.jobs import study as module
from research.jobs.study import ARMS, OURS, WHOLE, Study


@pytest.mark.parametrize("name", ARMS)
def test_the_trainer_knows_the_flags_of_every_arm(name: str, tmp_path: Path) -> None:
    study = Study(tmp_path, tmp_path / "study", "exact", tokens=4096)
    program, *arguments = study.training(name)
    parsed = cli.build_parser().parse(arguments)
    del parsed["print_config"]
    config = cli.configuration(parsed)
    assert program == "efficientllm-train"
    assert config.optimizer.tokens == 4096
    assert (config.pruning.target_bytes == 40_000_000) == (config.pruning.prune != ("none",))
    assert config.source.functions == "learned"
    assert config.source.sequence_length == 256


def test_finished_parts_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tmp_path, tmp_path / "study", "exact")
    done: list[str] = []

    def execute(command: list[str], log: Path) -> None:
        done.append(log.name)
        made = Path(command[command.index("--output") + 1])
        (made / "model" if command[0] == "efficientllm-train" else made).mkdir(parents=True)
        if command[0] == "efficientllm-eval":
            (made / "results.json").write_text("{}")

    monkeypatch.setattr(module, "_execute", execute)
    study.run(WHOLE)
    assert done == ["train.log", "export-q8_0.log", "score-q8_0.log", "export-q4_0.log", "score-q4_0.log"]
    study.run(WHOLE)
    assert len(done) == 5


def test_a_study_keeps_its_settings(tmp_path: Path) -> None:
    Study(tmp_path, tmp_path, "exact").keep_settings()
    Study(tmp_path, tmp_path, "exact").keep_settings()
    with pytest.raises(SystemExit, match="its study has another metric, limit; give another --output"):
        Study(tmp_path, tmp_path, "call", limit=5).keep_settings()


def test_scores_are_compared_with_the_whole_model(tmp_path: Path) -> None:
    study = Study(tmp_path, tmp_path, "exact")
    for name, file_type, values in ((WHOLE, "q8_0", [1.0, 1.0, 0.0, 1.0]), (OURS, "q4_0", [1.0, 0.0, 0.0, 1.0])):
        result = JobResult("exact", {"exact": values}, [""] * 4, 7.0, 90.0)
        scores, file = (study.folder(name) / f"{part}{file_type}" for part in ("score-", ""))
        scores.mkdir(parents=True)
        file.mkdir()
        (file / "model.gguf").write_bytes(bytes(200_000))
        evaluation = Evaluation(str(file), "", {}, {}, None, result).to_dict()
        (scores / "results.json").write_text(json.dumps({"evaluations": [evaluation]}))
    _, _, whole, ours = study.table().splitlines()
    assert whole.startswith("| whole | q8_0 | 0.2 | 0.750 ± 0.2")
    assert "|  | 7 | 90 |" in whole
    assert ours.startswith("| pruned by the preset | q4_0 | 0.2 | 0.500 ± 0.2")
    assert "| -25.0 ± 2" in ours


def test_a_failed_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"efficientllm-eval nothing --output .*\nended with 2; see .*x\.log"):
        module._execute(["efficientllm-eval", "nothing", "--output", str(tmp_path / "out")], tmp_path / "x.log")
    assert "nothing" in (tmp_path / "x.log").read_text()
