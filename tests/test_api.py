"""The front door: what the packages offer to programs, and that it does what its docstrings say."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from efficientllm.devices import BenchOptions, benchmark
from efficientllm.export import export
from efficientllm.runtime import EfficientLLMError, EngineOptions, Model, SamplingOptions, load
from efficientllm.train import OptimizerConfig, PruneConfig, RunConfig, SourceConfig, TrainConfig, train

NAMES = {
    "runtime": ["EfficientLLMError", "EngineOptions", "Model", "SamplingOptions", "__version__", "load"],
    "train": ["OptimizerConfig", "PruneConfig", "RunConfig", "SourceConfig", "TrainConfig", "train"],
    "export": ["export"],
    "devices": ["BenchOptions", "benchmark"],
}
"""A name that goes is a break, one that comes is a promise: both change this table."""


@pytest.fixture(scope="module")
def model(artefact: Path) -> Model:
    return load(artefact, EngineOptions(threads=1, context=256))


@pytest.mark.parametrize("package", NAMES)
def test_exactly_these_names_are_offered(package: str) -> None:
    module = importlib.import_module(f"efficientllm.{package}")
    assert sorted(module.__all__) == sorted(NAMES[package])
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'anything'"):
        _ = module.anything


def test_importing_the_packages_imports_none_of_their_engines() -> None:
    script = "import sys, efficientllm.runtime, efficientllm.train, efficientllm.export, efficientllm.devices\n"
    script += "assert not {'torch', 'transformers', 'llama_cpp', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_stream_and_chat_say_the_same(model: Model) -> None:
    whole = model.chat("Hello", max_tokens=12)
    assert whole == "".join(model.stream([{"role": "user", "content": "Hello"}], max_tokens=12))
    assert model.stats is not None
    assert 0 < model.stats.completion_tokens <= 12


def test_a_seed_repeats_an_answer_and_a_stop_string_ends_it(model: Model) -> None:
    one, two, other = (model.chat("Hello", max_tokens=24, temperature=1.5, seed=seed) for seed in (3, 3, 4))
    assert one == two != other
    for stop in (one[2:4], [one[2:5]]):
        answer = model.chat("Hello", max_tokens=24, temperature=1.5, seed=3, stop=stop)
        assert answer == one.partition("".join(stop))[0]


def test_completion_text_equals_that_of_the_generated_tokens(model: Model) -> None:
    prompt = model.tokenize("A small model")
    answer = model.generate(prompt, max_tokens=8)
    assert len(answer) == 8
    assert model.detokenize(answer) == model.complete("A small model", max_tokens=8)


def test_wrong_options_give_one_line(model: Model) -> None:
    with pytest.raises(EfficientLLMError, match=r"unknown option 'temprature'; known: .*temperature"):
        model.chat("Hello", temprature=1.0)
    with pytest.raises(EfficientLLMError, match="--top-p 2: must be above 0 and at most 1"):
        model.chat("Hello", top_p=2)
    with pytest.raises(EfficientLLMError, match="leaves no room"):
        model.stream("word " * 500)  # refused before the first piece is asked for


@pytest.mark.slow
def test_the_whole_chain_in_python(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        source=SourceConfig(str(source_folder), data=(str(corpus),), sequence_length=32, eval_tokens=256),
        pruning=PruneConfig(target_ratio=0.9),
        optimizer=OptimizerConfig(tokens=640, batch_size=2),
        run=RunConfig(output=str(tmp_path / "run"), dtype="float32"),
    )
    assert train(config) == tmp_path / "run" / "model"
    artefact = export(tmp_path / "run", "gguf", tmp_path / "gguf", quantize="q8_0")
    assert artefact == tmp_path / "gguf"
    with load(artefact) as model:
        assert isinstance(model.chat("Hello", max_tokens=4), str)
    options = BenchOptions(prompt_tokens=(8,), decode_tokens=(4,), depths=(), repetitions=1, rounds=1)
    run = benchmark([artefact], options)
    assert run.results[0].speeds["tg4"].median > 0


def test_the_library_prints_nothing(source_folder: Path, tmp_path: Path) -> None:
    script = f"""
from efficientllm.export import export
export({str(source_folder)!r}, "gguf", {str(tmp_path / "gguf")!r}, quantize="f32", verify=False)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_sampling_options_equal_those_of_the_command_line() -> None:
    assert SamplingOptions().temperature == 0.0


def test_closed_model_refuses_requests(artefact: Path) -> None:
    model = load(artefact, EngineOptions(threads=1, context=64))
    stream = model.stream("Hello", max_tokens=8)
    next(stream)
    model.close()
    model.close()
    for use in (lambda: list(stream), lambda: model.chat("Hello"), lambda: model.detokenize([5])):
        with pytest.raises(EfficientLLMError, match="the model is closed"):
            use()


@pytest.mark.parametrize("tokens", [[400], [-1], [99999]])
def test_tokens_outside_the_vocabulary_are_refused(model: Model, tokens: list[int]) -> None:
    for use in (model.detokenize, model.generate):
        with pytest.raises(EfficientLLMError, match="is outside the vocabulary of 400"):
            use(tokens)
    with pytest.raises(EfficientLLMError, match="the list of tokens is empty"):
        model.generate([])


WRONG_OPTIONS: list[tuple[Any, dict[str, Any], str]] = [
    (PruneConfig, {"layout": "unifrom"}, "--layout unifrom: is not one of per-layer, uniform; did you mean uniform?"),
    (PruneConfig, {"target_ratio": "0.8"}, "--target-ratio '0.8': must be of type float"),
    (PruneConfig, {"target_params": "100M"}, "--target-params '100M': must be of type int"),
    (PruneConfig, {"target_ratio": 80.0}, "--target-ratio 80.0: must be above 0 and at most 1"),
    (SourceConfig, {"data": "corpus.jsonl"}, "--data 'corpus.jsonl': must be of type tuple"),
    (SourceConfig, {"data": [1]}, "--data [1]: must be a list of str"),
    (OptimizerConfig, {"tokens": "1B"}, "--tokens '1B': must be of type int"),
    (RunConfig, {"dtype": "bf16"}, "--dtype bf16: is not one of auto, bfloat16, float32"),
    (EngineOptions, {"threads": "2"}, "--threads '2': must be of type int"),
    (EngineOptions, {"context": -1}, "--context -1: must not be negative"),
    (SamplingOptions, {"temperature": "hot"}, "--temperature 'hot': must be of type float"),
    (BenchOptions, {"rounds": 0}, "--rounds 0: must be positive"),
]


@pytest.mark.parametrize(("options", "values", "message"), WRONG_OPTIONS, ids=lambda value: str(value)[:40])
def test_options_made_in_python_are_checked(options: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(EfficientLLMError) as raised:
        options(**values)
    assert str(raised.value) == message


def test_one_answer_at_a_time(model: Model) -> None:
    first = model.stream("Hello", max_tokens=24, temperature=1.5, seed=3)
    next(first)
    assert model.complete("A small", max_tokens=2) is not None
    with pytest.raises(EfficientLLMError, match="another answer started on this model"):
        list(first)
