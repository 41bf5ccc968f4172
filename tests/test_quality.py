"""What a model keeps of its source: the texts that ship, the measurement, the contract."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_architecture, tiny_model
from training import command, run
from transformers import PreTrainedTokenizerFast

from efficientllm.export import cli as export_cli
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.engines.contract_text import ALL_TEXTS, contract_rows
from efficientllm.train.evaluation import cli
from efficientllm.train.evaluation.cli import rows
from efficientllm.train.evaluation.evaluate import ComputeConfig, Evaluation, MeasureConfig, evaluate
from efficientllm.train.evaluation.quality import sets
from efficientllm.train.evaluation.quality.contract import Quality, contract, measure_quality
from efficientllm.train.evaluation.torch_model import TorchModel


def test_shipped_sets_are_many_and_of_many_kinds() -> None:
    texts = sets.texts()
    assert len(texts) >= 5
    assert all(len(documents) >= 8 for documents in texts.values())
    everything = [document for documents in texts.values() for document in documents]
    assert len({document[:80] for document in everything}) == len(everything)
    assert len(sets.chats()) >= 60
    assert len({fact.question for fact in sets.facts()}) >= 60


def test_an_answer_is_judged_by_its_first_sentence() -> None:
    fact = next(fact for fact in sets.facts() if "capital of France" in fact.question)
    assert fact.is_right("The capital of France is Paris.")
    assert fact.is_right("\nparis")
    assert not fact.is_right("The capital of France is Lyon. Paris is another city.")
    assert not fact.is_right("")
    assert not any(fact.is_right(fact.question) for fact in sets.facts())


@pytest.fixture
def scored(tokenizer: PreTrainedTokenizerFast) -> TorchModel:
    return TorchModel(tiny_model(tiny_architecture()), tokenizer, torch.device("cpu"), False, 512)


def test_figures_equal_a_direct_computation(scored: TorchModel, tokenizer: PreTrainedTokenizerFast) -> None:
    quality = measure_quality(scored)
    kind, documents = next(iter(sets.texts().items()))
    ids = torch.tensor(tokenizer.encode(documents[0])[:257])
    with torch.no_grad():
        logits = scored.model(ids[None, :-1]).logits[0]
    assert quality.texts[kind][0] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[1:])), abs=1e-4)
    chat = sets.chats()[0]
    messages = [{"role": "user", "content": chat.question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before = tokenizer.encode(str(prompt), add_special_tokens=False)
    answer = [*tokenizer.encode(chat.answer, add_special_tokens=False), tokenizer.eos_token_id]
    whole = torch.tensor([*before, *answer])
    with torch.no_grad():
        logits = scored.model(whole[None, :-1]).logits[0, len(before) - 1 :]
    losses = torch.nn.functional.cross_entropy(logits, whole[len(before) :], reduction="none")
    assert quality.chat_answers[0] == pytest.approx(float(losses[:-1].mean()), abs=1e-4)
    assert quality.turn_ends[0] == pytest.approx(float(losses[-1]), abs=1e-4)
    assert len(quality.answers) == len(quality.right) == 2


def test_batched_answers_equal_those_of_one_prompt_alone(scored: TorchModel) -> None:
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15]]
    assert list(scored.answer(prompts, 8)) == [next(iter(scored.answer([prompt], 8))) for prompt in prompts]


def test_contract_pairs_documents_and_weighs_kinds_alike() -> None:
    sizes = {"a": [4.0, 6.0], "b": [5.0]}
    source = Quality({"a": [1.0, 3.0], "b": [2.0]}, [1.0, 2.0], [0.5, 0.5], [], sizes, 400)
    model = Quality({"a": [1.2, 3.4], "b": [2.1]}, [1.1, 2.1], [0.5, 1.5], [], sizes, 400)
    found = contract(model, source, "src")
    assert found["texts"]["a"]["ratio"] == pytest.approx(math.exp(0.3))
    # differences .2 and .4: standard error .1, although the documents themselves differ by 2
    assert found["texts"]["a"]["ratio_stderr"] == pytest.approx(0.1 * math.exp(0.3))
    assert found["texts"][ALL_TEXTS]["ratio"] == pytest.approx(math.exp((0.3 + 0.1) / 2))
    assert found["chat_answers"]["ratio_stderr"] == pytest.approx(0.0, abs=1e-12)
    assert found["end_of_turn"]["difference"] == pytest.approx(0.5)
    assert len(contract_rows(found)) == 1 + 3 + 2


def test_models_of_other_tokens_are_compared_by_bytes() -> None:
    """Half as many bytes a token, and half the nats: as good."""
    sizes = {"a": [4.0, 6.0], "chat answers": [5.0]}
    source = Quality({"a": [1.0, 3.0]}, [2.0], [0.5], [], sizes, 400)
    halves = {name: [size / 2 for size in each] for name, each in sizes.items()}
    found = contract(Quality({"a": [0.5, 1.5]}, [1.1], [0.5], [], halves, 300), source, "src")
    assert found["texts"]["a"]["ratio"] == pytest.approx(1.0)
    assert found["chat_answers"]["ratio"] == pytest.approx(math.exp(0.2))
    bits = (1 / 4 + 3 / 6) / 2 / math.log(2)
    assert found["bits_per_byte"] == pytest.approx({"bits_per_byte": bits, "reference": bits})
    (line,) = [row for row in contract_rows(found) if row[0] == f"perplexity per token of the source, {ALL_TEXTS}"]
    assert all(cell.endswith(f"({bits:.4f} bits per byte)") for cell in line[1:3])


def test_tables_of_other_tokenizers_show_bits_per_byte() -> None:
    def told(*sizes: int) -> bool:
        qualities = [Quality({"a": [1.0]}, [], [], [], {"a": [4.0]}, size) for size in sizes]
        table = rows([Evaluation(f"m{index}", "", {}, {}, each) for index, each in enumerate(qualities)])
        (line,) = [row for row in table if row[0] == f"perplexity, {ALL_TEXTS}"]
        return all("bits per byte" in cell for cell in line[2:])

    assert told(300)
    assert told(400, 300)
    assert not told(400, 400)


def test_a_model_without_a_chat_template_is_measured_on_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    quality = measure_quality(TorchModel(tiny_model(tiny_architecture()), plain, torch.device("cpu"), False, 512))
    assert quality.texts
    assert not quality.chat_answers
    assert not quality.answers
    assert "chat_answers" not in contract(quality, quality, "itself")


def test_an_artefact_has_the_quality_of_its_checkpoint(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture())
    arguments = [str(checkpoint), "--target", "gguf", "--quantize", "f32", "--output", str(tmp_path / "gguf")]
    assert run_command(export_cli.body, arguments) == 0
    measured = [
        evaluate(path, MeasureConfig(), ComputeConfig(device="cpu")).quality for path in (checkpoint, tmp_path / "gguf")
    ]
    one, other = measured
    assert one is not None
    assert other is not None
    for kind, nats in one.texts.items():
        assert np.allclose(nats, other.texts[kind], atol=1e-3)
    assert np.allclose(one.chat_answers, other.chat_answers, atol=1e-3)
    assert one.answers == other.answers


def test_a_run_leaves_its_contract_in_card_summary_and_manifest(
    source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    assert run(command(source_folder, corpus, tmp_path / "run", "--quality")) == 0
    model = tmp_path / "run" / "model"
    found = json.loads((model / "training.json").read_text())["quality"]
    assert found["texts"][ALL_TEXTS]["ratio"] > 0
    assert "perplexity, all texts" in (model / "README.md").read_text()
    both = json.loads((model / "quality.json").read_text())
    again = contract(Quality(**both["final"]), Quality(**both["source"]), found["reference"])
    for kind, figures in found["texts"].items():
        assert again["texts"][kind] == pytest.approx(figures)
    arguments = [str(tmp_path / "run"), "--target", "gguf", "--quantize", "f32", "--output", str(tmp_path / "gguf")]
    assert run_command(export_cli.body, arguments) == 0
    manifest = (tmp_path / "gguf" / "manifest.json").read_text()
    assert json.loads(manifest)["training"]["quality"] == found


def test_run_without_quality_prints_no_quality(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    assert run(command(source_folder, corpus, tmp_path / "run")) == 0
    model = tmp_path / "run" / "model"
    assert json.loads((model / "training.json").read_text())["quality"] is None
    assert not (model / "quality.json").exists()


def test_eval_shows_a_model_beside_the_first(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    first = save_tiny(tiny_architecture()).rename(tmp_path / "first")
    other = save_tiny(tiny_architecture(), seed=3).rename(tmp_path / "other")
    arguments = [str(first), "--compare", str(other), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert run_command(cli.body, arguments) == 0
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "perplexity, all texts" in table
    assert re.search(r"questions answered right .* \| \d+ of first's \d+, \d+ in all \|", table)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["evaluations"][1]["quality"]["answers"]) == 2
    assert results["evaluations"][0]["perplexity"] == {}
    (other / "model.safetensors").rename(other / "kept.safetensors")
    assert run_command(cli.body, [*arguments, "--no-quality"]) == 2
