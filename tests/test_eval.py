"""Evaluation: agreement with lm-eval's own model, with torch, and between torch and the engines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_architecture, tiny_model
from transformers import PreTrainedTokenizerFast

from efficientllm.export import cli as export_cli
from efficientllm.export.verification import sample_text
from efficientllm.runtime.base import model_names
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import DataError
from efficientllm.runtime.base.model_names import demo_source_path
from efficientllm.runtime.engines.engine import CacheChoice, EngineOptions
from efficientllm.runtime.engines.manifest import Manifest, describe_files
from efficientllm.train.evaluation import cli, perplexity
from efficientllm.train.evaluation.cli import paired_difference, rows
from efficientllm.train.evaluation.evaluate import ComputeConfig, MeasureConfig, evaluate
from efficientllm.train.evaluation.harness import GOLD, run_task
from efficientllm.train.evaluation.scoring import EngineModel, ScoreCache, ScoreRequest
from efficientllm.train.evaluation.tasks import TASKS, TaskResult, open_task
from efficientllm.train.evaluation.torch_model import TorchModel
from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.model.source import load_source

SHARED_DATA = Path(os.environ.get("EFFICIENTLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every task, of our own invention, in lm-eval's fields."""
    folder = tmp_path_factory.mktemp("data")
    words = ["water", "a stone bridge", "music", "the long way home", "seven", "light and air"]

    def write(task: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / TASKS[task].rows).write_text(text, encoding="utf-8")

    def pick(index: int, count: int) -> list[str]:
        return [words[(index + step) % len(words)] for step in range(count)]

    def choices(index: int) -> dict[str, list[str]]:
        return {"text": pick(index, 4), "label": [*"ABCD"]}

    several = range(6)
    for task in ("arc_easy", "arc_challenge"):
        asked = [{"id": str(i), "question": f"Then {i}\u2028?"} for i in several]  # no new row at a line separator
        write(task, [{**row, "choices": choices(i), "answerKey": "ABCD"[i % 4]} for i, row in enumerate(asked)])
    write("boolq", [{"passage": f"P {i}.", "question": f"is {i} even", "label": 1 - i % 2, "idx": i} for i in several])
    write("hellaswag", [{"query": f"He took {words[i]}", "choices": pick(i, 4), "gold": i % 4} for i in several])
    stems = enumerate(f"The {i}th is" for i in several)
    write("openbookqa", [{"question_stem": stem, "choices": choices(i), "answerKey": "B"} for i, stem in stems])
    write("piqa", [{"goal": f"do {i}", "sol1": words[i], "sol2": words[i - 1], "label": i % 2} for i in several])
    write(
        "winogrande",
        [{"sentence": f"{i}: _ was big.", "option1": words[i], "option2": "it", "answer": "1"} for i in several],
    )
    mmlu = [
        {"question": f"Q{i}?", "subject": subject, "choices": pick(i, 4), "answer": i % 4}
        for subject in ("anatomy", "virology")
        for i in several
    ]
    write("mmlu", mmlu)
    lines = [" \n" if not line else f" {line} \n" for line in sample_text().split("\n")]
    (folder / perplexity.WIKITEXT_FILE).write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "checkpoint"
    save_checkpoint(tiny_model(tiny_architecture()), tokenizer, folder)
    return folder


def torch_model(folder: Path) -> TorchModel:
    return TorchModel.load(folder, "cpu", "float32", 0, 2048)


def score_by_lm_eval(folder: Path, task: str, data_dir: Path, limit: int) -> dict[str, float]:
    """Means that lm-eval's own `hf` model gets."""
    from lm_eval.evaluator import evaluate as evaluate_by_lm_eval
    from lm_eval.models import huggingface
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model_class: Any = huggingface.HFLM  # a decorator of theirs hides its parameters
    theirs = model_class(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)
    with open_task(task, data_dir) as tasks:
        results: Any = evaluate_by_lm_eval(theirs, tasks, limit=limit or None, bootstrap_iters=2)
    (scores,) = results["results"].values()
    return {name.removesuffix(",none"): value for name, value in scores.items() if name.endswith(",none")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("task", ["arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande"])
def test_scores_equal_those_of_the_model_of_lm_eval(checkpoint: Path, data_dir: Path, task: str) -> None:
    ours = run_task(task, torch_model(checkpoint), data_dir, 0, ScoreCache())
    theirs = score_by_lm_eval(checkpoint, task, data_dir, 0)
    for metric in set(ours.values) - {GOLD}:
        assert ours.mean(metric) == pytest.approx(theirs[metric])
        assert ours.stderr(metric) == pytest.approx(theirs[f"{metric}_stderr"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_scores_of_the_real_source_equal_lm_evals(tmp_path: Path) -> None:
    if not (SHARED_DATA / "eval").is_dir():
        pytest.skip("no evaluation data; set EFFICIENTLLM_DATA to the folder that holds eval/")
    save_checkpoint(*load_source(str(demo_source_path())), tmp_path / "source")
    ours = run_task("arc_easy", torch_model(tmp_path / "source"), SHARED_DATA / "eval", 4, ScoreCache())
    theirs = score_by_lm_eval(tmp_path / "source", "arc_easy", SHARED_DATA / "eval", 4)
    metrics = set(ours.values) - {GOLD}
    assert {name: ours.mean(name) for name in metrics} == pytest.approx({name: theirs[name] for name in metrics})


def test_mmlu_is_the_average_over_the_documents_of_all_subjects(checkpoint: Path, data_dir: Path) -> None:
    result = run_task("mmlu", torch_model(checkpoint), data_dir, 4, ScoreCache())
    assert len(result.documents) == 8
    assert result.mean() == sum(result.values["acc"]) / 8


def test_score_is_the_log_softmax_of_the_full_forward(checkpoint: Path) -> None:
    model = torch_model(checkpoint)
    ids = model.tokenize(sample_text()[:300])
    requests = [ScoreRequest(tuple(ids[:40]), 10), ScoreRequest(tuple(ids[5:20]), 1), ScoreRequest((*ids[:39], 7), 38)]
    with torch.inference_mode():
        for index, score in model.score(requests):
            tokens, first = requests[index].tokens, requests[index].first
            full = torch.log_softmax(model.model(torch.tensor([tokens])).logits[0], -1)
            expected = full[range(first - 1, len(tokens) - 1), tokens[first:]]
            torch.testing.assert_close(torch.from_numpy(score.log_probs).float(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [9, 12, 13, 21, 40])
def test_only_tokens_with_enough_before_them_count_and_each_does_once(checkpoint: Path, length: int) -> None:
    """Windows of 12 tokens, of which the first 8 are only read."""
    model = torch_model(checkpoint)
    ids = model.tokenize(sample_text())[:length]
    found = perplexity.measure_perplexity(model, [ids, ids[:8]], 12, ScoreCache(), min_context=8)
    nats = []
    with torch.inference_mode():
        for place in range(8, length):  # each from the start of its window, which the overlap moves by 12 - 8 + 1
            start = (place - 8) // 5 * 5
            window = torch.tensor([ids[start:place]])
            nats.append(-torch.log_softmax(model.model(window).logits[0, -1], -1)[ids[place]].item())
    assert (found.tokens, found.documents, found.min_context) == (length - 8, 1, 8)
    assert math.log(found.perplexity) == pytest.approx(sum(nats) / len(nats), abs=1e-4)
    size = model.num_bytes(ids[8:])
    assert model.num_bytes(model.tokenize("\u65e5")[-2:]) == 2  # a part of a character
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / size, abs=1e-4)


@pytest.mark.parametrize(
    ("document_tokens", "limit", "min_context", "predicted"),
    [
        (0, 0, 1, [4, 49, 49, 4]),  # 5, 50, 50 and 5 tokens a document
        (20, 0, 1, [4, 20, 20, 4]),
        (20, 30, 1, [4, 20, 6]),
        (0, 60, 10, [40, 20]),
        (0, 0, 10, [40, 40]),
    ],
)
def test_as_much_of_a_text_is_read_as_is_to_be_predicted(
    checkpoint: Path, tmp_path: Path, document_tokens: int, limit: int, min_context: int, predicted: list[int]
) -> None:
    model, path = torch_model(checkpoint), tmp_path / "text.jsonl"
    words = model.tokenizer.decode(model.tokenize(sample_text())[:50])
    short = model.tokenizer.decode(model.tokenize(sample_text())[:5])
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (short, words, words, short)))
    documents = perplexity.corpus_documents(model, str(path), document_tokens, limit, min_context)
    assert [len(tokens) - min_context for tokens in documents] == predicted


def test_text_without_a_long_document_gives_one_line(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "short"}) + "\n")
    with pytest.raises(DataError, match="no document has more than 200 tokens"):
        perplexity.corpus_documents(torch_model(checkpoint), str(path), 0, 0, 200)
    with pytest.raises(ValueError, match="must be at most --document-tokens 128"):
        MeasureConfig(text=(str(path),), min_context=256, document_tokens=128)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "quantize"), [("gguf", "f32"), ("onnx", "f32")])
def test_an_fp32_artefact_scores_like_its_checkpoint(
    checkpoint: Path, tmp_path: Path, target: str, quantize: str
) -> None:
    arguments = [str(checkpoint), "--target", target, "--quantize", quantize, "--output", str(tmp_path / "artefact")]
    assert run_command(export_cli.body, arguments) == 0
    path = tmp_path / "text.txt"
    path.write_text(sample_text(), encoding="utf-8")
    measures = MeasureConfig(tasks=("none",), text=(str(path),), text_tokens=600, document_tokens=0, window=128)
    torch_value = evaluate(checkpoint, measures, ComputeConfig()).perplexity["text"]
    engine_value = evaluate(tmp_path / "artefact", measures, ComputeConfig()).perplexity["text"]
    # llama.cpp keeps its KV cache in fp16
    assert engine_value.perplexity == pytest.approx(torch_value.perplexity, rel=1e-3)
    assert engine_value.bits_per_byte == pytest.approx(torch_value.bits_per_byte, rel=1e-3)
    assert engine_value.tokens == torch_value.tokens == 600


@pytest.mark.slow
def test_models_that_differ_in_their_weights_alone_share_no_answers(checkpoint: Path, tmp_path: Path) -> None:
    """The graph of an ONNX folder is the same for all weights of one shape: they lie beside it."""
    folder = tmp_path / "onnx"
    arguments = [str(checkpoint), "--target", "onnx", "--quantize", "int8", "--no-verify", "--output", str(folder)]
    assert run_command(export_cli.body, arguments) == 0
    path = tmp_path / "text.txt"
    path.write_text(sample_text(), encoding="utf-8")
    measures = MeasureConfig(tasks=("none",), text=(str(path),), text_tokens=100, window=64)
    values = [evaluate(folder, measures, ComputeConfig(), tmp_path)]
    data = bytearray((folder / "model.onnx_data").read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    (folder / "model.onnx_data").write_bytes(data)
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, files=describe_files(folder, list(manifest.files))).write(folder)
    values.append(evaluate(folder, measures, ComputeConfig(), tmp_path))
    assert values[0].fingerprint != values[1].fingerprint
    assert values[0].perplexity["text"].perplexity != values[1].perplexity["text"].perplexity


def test_engine_scores_do_not_depend_on_earlier_evaluations(artefact: Path) -> None:
    model = EngineModel(artefact, EngineOptions())
    ids = model.tokenize(sample_text()[:800])
    requests = [
        ScoreRequest(tuple(ids[:90]), 80),
        ScoreRequest(tuple(ids[:90]), 1),
        ScoreRequest(tuple(ids[:50] + ids[60:]), 50),
    ]
    together = dict(model.score(requests))
    for index, request in enumerate(requests):
        (alone,) = (score for _, score in EngineModel(artefact, EngineOptions()).score([request]))
        assert together[index].log_probs == pytest.approx(alone.log_probs, abs=2e-3)


def test_quality_is_of_the_same_cache_on_every_machine(artefact: Path) -> None:
    choices: dict[CacheChoice, str] = {"auto": "f16", "q8_0": "q8_0"}
    for asked, cache in choices.items():
        model = EngineModel(artefact, EngineOptions(threads=1, context=64, kv_cache=asked))
        assert model.engine.settings.startswith(f"{cache} cache")
        model.engine.close()


def test_wikitext_is_read_as_the_hub_serves_it(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = Title = \n \n Text . \n", encoding="utf-8")
    assert perplexity.read_wikitext(path) == "\n\n = Title = \n\n\n\n\n Text . \n\n\n"


def test_interrupted_evaluation_asks_only_missing_questions(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = run_task("piqa", torch_model(checkpoint), data_dir, 0, ScoreCache(path))
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20], encoding="utf-8")  # killed in the middle of a line
    asked: list[int] = []
    again = run_task(
        "piqa", torch_model(checkpoint), data_dir, 0, ScoreCache(path), lambda done, total: asked.append(done)
    )
    assert again == first
    assert len(asked) == len(lines) - 7


def test_command_compares_models_with_paired_differences(
    checkpoint: Path, artefact: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [str(checkpoint), "--compare", str(artefact), "--data-dir", str(data_dir), "--output", str(output)]
    arguments += ["--tasks", "piqa,arc_easy", "--text", "wikitext2", "--text-tokens", "300"]
    assert run_command(cli.body, arguments) == 0
    printed = capsys.readouterr()
    assert "piqa (acc_norm)" in printed.out
    assert "average of tasks" in printed.out
    table = (output / "results.md").read_text(encoding="utf-8")
    assert "the change from checkpoint, paired" in table
    data = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert [len(e["tasks"]["piqa"]["samples"]["documents"]) for e in data["evaluations"]] == [6, 6]
    assert data["evaluations"][0]["perplexity"]["wikitext2"]["tokens"] == 300


def test_only_tasks_need_lm_eval() -> None:
    """It is an extra, and perplexity and quality are measured without it."""
    code = "import sys; sys.modules['lm_eval'] = None; import efficientllm.train.evaluation.cli"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)


def test_paired_difference_has_the_error_of_the_differences() -> None:
    one = TaskResult("acc", ["a", "b", "c", "d"], {"acc": [1.0, 0.0, 1.0, 0.0]})
    other = TaskResult("acc", ["b", "a", "d", "c"], {"acc": [1.0, 1.0, 1.0, 1.0]})
    difference, error, count = paired_difference(one, other)
    assert (difference, count) == (0.5, 4)
    assert error == pytest.approx(math.sqrt(1 / 3) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "piqa,arcade"], "arcade: unknown; known: arc_challenge"),
        (["--data-dir", "nowhere"], "no such folder"),
        (["--window", "1"], "--window 1: must be at least 2"),
        (["--min-context", "513"], "--min-context 513: must be at most the window of 512"),
        (["--limit", "-1"], "--limit -1: must not be negative"),
        (["--tasks", "none", "--text", "missing.txt"], "error: --text missing.txt: no such file or folder, and not"),
        (["--tasks", "none", "--text", "a=BAD"], 'a.jsonl: line 1 has no field "text"; it has x\n'),
        (["--tasks", "none", "--compare", "no-model"], "no-model: no such folder or file"),
    ],
)
def test_bad_input_gives_one_line(
    checkpoint: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "a.jsonl"
    bad.write_text('{"x": 1}\n')
    arguments = [argument.replace("BAD", str(bad)) for argument in arguments]
    assert run_command(cli.body, [str(checkpoint), "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_names_every_task_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("60", "80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        words = re.split(r"[\s,;]+", cli.build_parser().format_help())
        assert {*TASKS, "efficientllm-train"} <= set(words)


def test_missing_rows_name_the_task_and_malformed_ones_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data_dir: Path
) -> None:
    arguments = [str(checkpoint), "--output", str(tmp_path / "out"), "--data-dir", str(tmp_path), "--tasks", "boolq"]
    assert run_command(cli.body, arguments) == 2
    assert "drop boolq from --tasks" in capsys.readouterr().err
    (tmp_path / TASKS["boolq"].rows).write_text("{", encoding="utf-8")
    assert run_command(cli.body, [*arguments, "--text", str(data_dir / perplexity.WIKITEXT_FILE)]) == 2
    assert "is not JSON lines" in capsys.readouterr().err


SaveTiny = Callable[..., Path]


def test_demo_is_the_built_in_model(
    checkpoint: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_names, "demo_source_path", lambda: checkpoint)
    arguments = ["demo", "--no-quality", "--text", f"ours={corpus}", "--text-tokens", "50", "--output", str(tmp_path)]
    assert run_command(cli.body, arguments) == 0
    assert "perplexity, ours" in capsys.readouterr().out


def test_a_plain_hugging_face_folder_is_measured_too(source_folder: Path, corpus: Path) -> None:
    measures = MeasureConfig(tasks=("none",), text=(f"docs={corpus}",), text_tokens=200)
    assert evaluate(source_folder, measures, ComputeConfig()).perplexity["docs"].tokens == 200


def test_evaluation_measures_only_requested_parts(source_folder: Path, tmp_path: Path) -> None:
    """WikiText-2 lies in the data folder, and is not asked for."""
    (tmp_path / perplexity.WIKITEXT_FILE).write_text(" = Title = \n A text . \n", encoding="utf-8")
    (tmp_path / "one.txt").write_text("The one document that there is.", encoding="utf-8")
    measures = MeasureConfig(quality=False, data_dir=str(tmp_path), text=(f"one={tmp_path / 'one.txt'}",))
    found = evaluate(source_folder, measures, ComputeConfig(device="cpu"))
    assert found.perplexity.keys() == {"one"}
    assert not found.tasks
    assert math.isnan(found.perplexity["one"].stderr)
    header, row = rows([found])[:2]
    assert "±" not in "".join((*header, *row))
