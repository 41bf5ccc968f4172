"""A folder with a file that is not what it should be is one line, in every command and for every target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import export
from safetensors.torch import load_file, save_file
from tiny import LLAMA3_ROPE, tiny_architecture, tiny_model
from training import ERRORS, command, one_line, run
from transformers import PreTrainedTokenizerFast

from efficientllm.export.targets import EXPORTERS
from efficientllm.runtime.base.command import run_command
from efficientllm.train.evaluation import cli as eval_cli
from efficientllm.train.model.irregular import save_checkpoint

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "of another type": lambda data: b"[1, 2]",
    "not UTF-8": lambda data: b'{"name": "caf\xe9"}',
}
FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
CASES = [(file, how) for file in FILES for how in DAMAGE if (file, how) != ("chat_template.jinja", "of another type")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder in two shards, with every file that can be damaged."""
    folder = tmp_path_factory.mktemp("whole")
    save_checkpoint(tiny_model(tiny_architecture()), tokenizer, folder)
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index in range(2):
        file = f"model-{index + 1:05}-of-00002.safetensors"
        save_file(dict(tensors[index::2]), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(dict(tensors[index::2]), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert all((folder / file).is_file() for file in FILES)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def change(path: Path, **values: Any) -> None:
    """Replace values of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize("target", EXPORTERS)
@pytest.mark.parametrize(("file", "how"), CASES)
def test_every_target_refuses_a_damaged_file_in_one_line(
    file: str, how: str, target: str, copy: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    (copy / file).write_bytes(DAMAGE[how]((copy / file).read_bytes()))
    assert export(copy, target, tmp_path / "out") == 2
    message = one_line(capsys)
    assert file in message or (file == "chat_template.jinja" and "chat template" in message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("file", "how"), [case for case in CASES if case[0] != "chat_template.jinja"])
def test_training_and_evaluation_refuse_a_damaged_file_in_one_line(
    file: str, how: str, copy: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    (copy / file).write_bytes(DAMAGE[how]((copy / file).read_bytes()))
    assert run(command(copy, corpus, tmp_path / "run")) == 2
    assert file in one_line(capsys)
    assert run_command(eval_cli.body, [str(copy), "--tasks=none", f"--text=own={corpus}", f"--output={tmp_path}"]) == 2
    assert file in one_line(capsys)


@pytest.mark.parametrize("target", EXPORTERS)
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("model.safetensors.index.json", "has no model.safetensors and no model.safetensors.index.json"),
        ("model-00002-of-00002.safetensors", "lacks model-00002-of-00002.safetensors, which"),
    ],
)
def test_a_missing_file_is_named(
    file: str, message: str, target: str, copy: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    (copy / file).unlink()
    assert export(copy, target, tmp_path / "out") == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_export_needs_no_optional_file(file: str, copy: Path, tmp_path: Path) -> None:
    (copy / file).unlink()
    assert export(copy, "gguf", tmp_path / "out", "--quantize", "f32") == 0


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"hidden_size": "64"}, "hidden_size is '64', but must be a whole number"),
    ("config.json", {"num_hidden_layers": None}, "num_hidden_layers is missing"),
    ("config.json", {"num_attention_heads": -4}, "num_attention_heads is -4"),
    ("config.json", {"intermediate_size": 96.0}, "intermediate_size is 96.0"),
    ("config.json", {"per_layer_config": [1]}, "per_layer_config is not an object of layer numbers"),
    ("config.json", {"per_layer_config": {"0": 3}}, "per_layer_config of layer 0 is 3"),
    ("config.json", {"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ("config.json", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    ("config.json", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ("config.json", {"rope_parameters": "default"}, "rope_parameters is 'default'"),
    ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta is 'big'"),
    ("config.json", {"rope_parameters": {**LLAMA3_ROPE, "factor": None}}, "factor is missing"),
    ("config.json", {"bos_token_id": 400}, "bos_token_id is 400, but the model has tokens 0 to 399"),
    ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "the weights are quantised (fp8)"),
    ("generation_config.json", {"eos_token_id": [2, "end"]}, "eos_token_id is [2, 'end']"),
    ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5, which is not text"),
    ("tokenizer_config.json", {"bos_token": {"content": [1]}}, "bos_token is [1], which is not text"),
]


@pytest.mark.parametrize("target", EXPORTERS)
@pytest.mark.parametrize(("file", "values", "message"), SETTINGS)
def test_a_setting_of_another_kind_is_named(
    file: str, values: dict[str, Any], message: str, target: str, copy: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    change(copy / file, **values)
    assert export(copy, target, tmp_path / "out") == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("target", EXPORTERS)
def test_tokens_without_a_row_in_the_embedding_are_refused(
    target: str, copy: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    data = json.loads((copy / "tokenizer.json").read_text())
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 400, "content": "<|tool|>"})
    (copy / "tokenizer.json").write_text(json.dumps(data))
    assert export(copy, target, tmp_path / "out") == 2
    assert "token '<|tool|>' has id 400, but the embedding has 400 rows" in one_line(capsys)
    assert run(command(copy, corpus, tmp_path / "run")) == 2
    assert "token '<|tool|>' has id 400" in one_line(capsys)


@pytest.mark.parametrize("target", EXPORTERS)
def test_weights_of_a_type_that_cannot_be_read_are_refused(
    target: str, copy: Path, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    file = copy / "model-00002-of-00002.safetensors"
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert export(copy, target, tmp_path / "out") == 2
    assert "is stored as F8_E4M3; only F64, F32, F16, BF16 can be read" in one_line(capsys)
    assert run(command(copy, corpus, tmp_path / "run")) == 2
    assert "is stored as F8_E4M3" in one_line(capsys)


@pytest.mark.parametrize("template", ["{{ messages / 0 }}", "{{ 1 // 0 }}", "{% for message in 5 %}{% endfor %}", " "])
def test_a_chat_template_that_cannot_be_rendered_is_refused(
    template: str, copy: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    (copy / "chat_template.jinja").write_text(template)
    assert export(copy, "onnx", tmp_path / "out") == 2
    assert "chat template" in one_line(capsys)


@pytest.mark.parametrize("slots", ["0", "1", "-5"])
def test_a_cache_without_room_is_refused(slots: str, copy: Path, tmp_path: Path, capsys: ERRORS) -> None:
    assert export(copy, "executorch", tmp_path / "out", f"--max-context={slots}") == 2
    assert "--max-context" in one_line(capsys)


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "config.json"])
def test_export_refuses_a_link_out_of_the_folder(name: str, copy: Path, tmp_path: Path, capsys: ERRORS) -> None:
    """A downloaded folder could carry a private file into what is published."""
    private = tmp_path / "private"
    private.write_bytes((copy / name).read_bytes() if (copy / name).is_file() else b"secret")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(private)
    assert export(copy, "hf-uniform", tmp_path / "out") == 2
    assert f"{name} is a link out of the folder" in capsys.readouterr().err


def test_export_reads_links_of_the_hubs_cache_and_links_of_weights(copy: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1", tmp_path / "models--a" / "blobs"
    snapshot.parent.mkdir(parents=True)
    copy.rename(blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert export(snapshot, "hf-uniform", tmp_path / "out") == 0
    shutil.copytree(snapshot, tmp_path / "apart", symlinks=True)
    for path in blobs.iterdir():
        (tmp_path / "apart" / path.name).unlink()
        if path.suffix == ".safetensors":
            (tmp_path / "apart" / path.name).symlink_to(path)
        else:
            shutil.copy(path, tmp_path / "apart")
    assert export(tmp_path / "apart", "hf-uniform", tmp_path / "out2") == 0


def test_empty_vocabulary_gives_one_line(copy: Path, tmp_path: Path, capsys: ERRORS) -> None:
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"] |= {"vocab": {}, "merges": []}
    path.write_text(json.dumps(tokenizer | {"added_tokens": []}))
    assert export(copy, "onnx", tmp_path / "out") == 2
    assert "tokenizer.json gives no tokens for a text; its vocabulary is empty" in capsys.readouterr().err


def test_index_without_metadata_gives_one_line(copy: Path, tmp_path: Path, capsys: ERRORS) -> None:
    path = copy / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))
    assert export(copy, "onnx", tmp_path / "out") == 2
    assert 'has no metadata, which transformers reads; add "metadata": {}' in capsys.readouterr().err


def test_a_tensor_in_two_files_gives_one_line(copy: Path, tmp_path: Path, capsys: ERRORS) -> None:
    first, second = (copy / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    save_file({**load_file(second), "model.norm.weight": torch.ones(64)}, second)
    save_file({**load_file(first), "model.norm.weight": torch.zeros(64)}, first)
    assert export(copy, "onnx", tmp_path / "out") == 2
    assert "tensor model.norm.weight is in" in one_line(capsys)


@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_odd_number_of_rotated_channels_gives_one_line(
    target: str, save_tiny: Callable[..., Path], tmp_path: Path, capsys: ERRORS
) -> None:
    shape = tiny_architecture("gpt_neox", head_dim=20)
    folder = save_tiny(
        shape, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    )
    assert export(folder, target, tmp_path / "out") == 2
    assert "5 of 20 channels are rotated; the number must be even" in capsys.readouterr().err


def test_a_setting_of_another_norm_changes_nothing(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_tiny(tiny_architecture("gpt_neox"), rms_norm_eps=1e-6)
    assert export(folder, "onnx", tmp_path / "out", "--quantize", "int8") == 0
