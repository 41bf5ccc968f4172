"""Checkpoints of other pruning tools are read by their tensors, compared with their originals, and exported."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import export
from foreign_tools import (
    TOKENS,
    TOOLS,
    change_config,
    channels,
    flap,
    gaps,
    keep,
    keep_ffn,
    llm_pruner,
    logits,
    nemotron_nas,
    puzzletron,
    rename,
    save,
    save_without_run,
    slicegpt,
    stock_model,
    wanda_sp,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_architecture
from training import command, metrics, run, unpruned
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from efficientllm.export.gguf.probe import probe
from efficientllm.runtime.base.errors import EfficientLLMError, ModelError
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.train.evaluation.torch_model import TorchModel
from efficientllm.train.model.architecture import Architecture
from efficientllm.train.model.foreign_configs import ImportOptions
from efficientllm.train.model.source import load_source

NOT_COMPARED = ("nemotron_nas", "openelm")
"""Fixtures whose original is another class than a stock one."""


@pytest.fixture
def made(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[Path, torch.Tensor]]:
    """made(maker) -> (folder of a tool with a tokenizer, logits of its model)."""

    def make(maker: Callable[[Path], torch.Tensor]) -> tuple[Path, torch.Tensor]:
        folder = tmp_path / maker.__name__
        tokenizer.save_pretrained(folder)
        return folder, maker(folder)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_gguf_and_onnx_of_a_tools_checkpoint_equal_its_model(
    tool: str, made: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = made(TOOLS[tool])
    tokens = TOKENS[0].tolist()
    for target in ("gguf", "onnx"):
        assert export(folder, target, tmp_path / target, "--quantize", "f32") == 0
    if tool != "mergekit":  # a plain folder
        note = "not compared with its original" if tool in NOT_COMPARED else "with these tensors: largest logit diff"
        said = capsys.readouterr().out
        assert "read by shape: " in said
        assert note in said
        assert any(note in each for each in Manifest.read(tmp_path / "onnx").notes)
    assert not (folder / "ran").exists()  # no code of the folder was run
    found = probe(tmp_path / "gguf" / "model.gguf", tokens, []).logits
    assert np.abs(found - expected.numpy()).max() < (0.05 if tool == "gpt_neox" else 1e-3)  # llama.cpp's table of GELU
    engine = load_engine(tmp_path / "onnx", EngineOptions(threads=1, context=64))
    rows = [engine.prefill(tokens[:24]), *(engine.decode(token) for token in tokens[24:])]
    engine.close()
    assert np.abs(np.stack(rows) - expected[23:].numpy()).max() < 1e-3


def test_a_foreign_checkpoint_is_pruned_further_with_itself_as_teacher(
    made: Callable[..., Any], corpus: Path, tmp_path: Path
) -> None:
    folder, _ = made(flap)
    assert run(command(folder, corpus, tmp_path / "run", "--distill", "1", "--tokens", "768")) == 0
    before = load_source(str(folder))[0]
    after = Architecture.from_folder(tmp_path / "run" / "model")
    assert after.family == "llama_bias"
    assert after.num_parameters < sum(each.numel() for each in before.parameters())


def whole_model(folder: Path) -> torch.Tensor:
    """The unpruned model of the fixtures."""
    return save(stock_model(), folder)


def test_another_tools_model_learns_from_a_named_teacher(
    made: Callable[..., Any], corpus: Path, tmp_path: Path
) -> None:
    """Distillation alone has no gradient while the teacher is the model itself."""
    folder, _ = made(llm_pruner)
    whole, _ = made(whole_model)
    norms = {}
    for name in ("source", str(folder), str(whole)):
        more = ("--distill", "1", "--cross-entropy", "0", "--tokens", "256", "--teacher", name, "--overwrite")
        assert run(unpruned(command(folder, corpus, tmp_path / "run", *more))) == 0
        norms[name] = next(record["grad_norm"] for record in metrics(tmp_path / "run") if "loss" in record)
    assert norms["source"] == norms[str(folder)] < 1e-4
    assert norms[str(whole)] > 0.1


def test_a_teacher_with_other_tokens_is_refused(
    made: Callable[..., Any], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made(llm_pruner)
    other, _ = made(whole_model)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    training = command(folder, corpus, tmp_path / "run", "--distill", "1", "--teacher", str(other))
    assert run(training) == 2
    assert "has another vocabulary than the source" in capsys.readouterr().err


def without_tables(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}


@pytest.mark.parametrize(("tool", "heads", "hidden"), [(wanda_sp, 10, 160), (flap, 8, 64)])
def test_a_head_dim_that_nothing_gives_is_asked_for(
    tool: Any, heads: int, hidden: int, made: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """80 rows are five heads of 16, or ten of 8. In the second, 128 rows would be more heads than config.json has."""
    folder, expected = made(tool)
    change_config(folder, head_dim=None, num_attention_heads=heads, hidden_size=hidden)
    rename(folder, without_tables)
    assert export(folder, "onnx", tmp_path / "out") == 2
    assert "head_dim is not in config.json and may be 8 or 16; give --head-dim" in capsys.readouterr().err
    assert export(folder, "onnx", tmp_path / "out", "--head-dim", "16") == 0
    model: Any = load_source(str(folder), foreign=ImportOptions(head_dim=16))[0]
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits[0], expected)
    assert export(folder, "onnx", tmp_path / "out2", "--head-dim", "48") == 2
    assert "head_dim 48 (--head-dim) does not divide" in capsys.readouterr().err


def test_a_rotary_table_gives_head_dim(made: Callable[..., Any]) -> None:
    folder, expected = made(wanda_sp)
    change_config(folder, head_dim=None, num_attention_heads=10, hidden_size=160)
    model: Any = load_source(str(folder))[0]
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits[0], expected)


def test_zero_sized_tensors_are_an_absent_block_and_its_bias_stays(made: Callable[..., Any]) -> None:
    """FLAP without any head or channel in a layer: what is left of the block is a constant."""
    folder, _ = made(flap)
    bias = load_file(folder / "model.safetensors")["model.layers.1.self_attn.o_proj.bias"]

    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for part in "qkv":
            tensors[f"model.layers.1.self_attn.{part}_proj.weight"] = torch.zeros(0, 128)
        tensors["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(128, 0)
        tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(128, 0)
        tensors["model.layers.2.mlp.down_proj.bias"] = torch.zeros(128)
        return tensors | {f"model.layers.2.mlp.{part}_proj.weight": torch.zeros(0, 128) for part in ("gate", "up")}

    rename(folder, cut)
    model: Any = load_source(str(folder))[0]
    assert torch.equal(
        model.model.layers[1].self_attn(
            torch.ones(1, 1, 128), model.model.rotary_emb(torch.ones(1, 1, 128), torch.zeros(1, 1, dtype=torch.long))
        )[0][0, 0],
        bias,
    )
    assert not list(model.model.layers[2].mlp.parameters())


LISTS: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 1, 1, 1]},
    "gemma3_text": {"layer_types": ["full_attention"] * 4, "query_pre_attn_scalar": 20},
}


@pytest.mark.parametrize("family", LISTS)
def test_equal_attention_of_all_layers_survives_a_removed_one(family: str, made: Callable[..., Any]) -> None:
    """The classes' own pattern, which applies without a list, gives some layers another attention."""

    def cut(folder: Path) -> torch.Tensor:
        model = stock_model(family, **LISTS[family])
        del model.model.layers[0]
        expected = logits(model)
        save_without_run(model, folder)
        return expected

    folder, expected = made(cut)
    model: Any = load_source(str(folder))[0]
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits[0], expected, atol=1e-5, rtol=1e-5)
    change_config(folder, **dict.fromkeys(LISTS[family]), sliding_window_pattern=2)
    with pytest.raises(ModelError, match="layers of unequal attention"):
        load_source(str(folder))


def test_evaluation_imports_instead_of_filling_a_cut_layer_with_random_weights(made: Callable[..., Any]) -> None:
    folder, expected = made(TOOLS["shortgpt"])
    model = TorchModel.load(folder, "cpu", "float32", 1, 1024).model
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits[0], expected)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another width": ({"layer_inter_size": [96, 70, 71, 96]}, "gives layer 2 a intermediate_size of 71"),
    "a linear block": (
        {"block_configs": [{"attention": {"replace_with_linear": True}}]},
        "replace_with_linear in block_configs is not supported",
    ),
    "another kind of list": ({"block_configs": [1]}, "block_configs is not a list of objects"),
    "a block that cannot be absent": ({"per_layer_config": {"0": {"skip": ["norm"]}}}, "skips 'norm'"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "the weights are quantised (fp8)"),
}
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a factor of the embedding": ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 is not supported"),
    "a cap of the logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
    "a clip": ({"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    "ALiBi": ({"alibi": True}, "alibi=True is not supported"),
    "a partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; llama rotates whole heads"),
    "two ropes": ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling has rope_type 'linear'"),
    "too many layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but must be at most 10000"),
}


def small(folder: Path) -> torch.Tensor:
    """A plain Llama."""
    return save(stock_model(), folder)


PHI3_ROPE = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75}


@pytest.mark.parametrize(
    ("maker", "settings", "message"),
    [
        *((llm_pruner, *case) for case in CONFIGS.values()),
        *((small, *case) for case in SETTINGS.values()),
        (slicegpt, {}, "mlp_shortcut_Q belongs to SliceGPT's rotations between blocks"),
        (
            TOOLS["adapt_pruner"],
            {"intermediate_size": [90, 83, 76, 70]},
            "gives layer 3 a intermediate_size of 70, but",
        ),
        (
            TOOLS["darwinlm"],
            {"pruned_heads": None},
            "layer 0 has 5 query heads over 4 key/value heads, and nothing says",
        ),
        (TOOLS["fused"], {"rope_parameters": PHI3_ROPE}, "partial_rotary_factor is 0.75; mistral rotates whole heads"),
    ],
)
def test_export_refuses_settings_that_contradict_the_tensors_or_are_not_read(
    maker: Callable[[Path], torch.Tensor | None],
    settings: dict[str, Any],
    message: str,
    made: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = made(maker)
    change_config(folder, **settings)
    assert export(folder, "onnx", tmp_path / "out", "--no-verify") == 2
    assert message in capsys.readouterr().err


def test_stock_classes_do_not_build_layers_of_unequal_width_yet() -> None:
    """When this fails, transformers has the modeling of pull request 45332, and irregular folders need no own file."""
    values = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 32}
    config = AutoConfig.for_model("llama", **values, per_layer_config={"1": {"intermediate_size": 16}})
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
        AutoModelForCausalLM.from_config(config)


class Hostile:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_of_objects_is_refused_and_not_run(
    made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLM-Pruner 128a07d saves {"model": model, "tokenizer": tokenizer} as pytorch_model.bin."""
    monkeypatch.chdir(tmp_path)
    folder, _ = made(gaps)
    torch.save({"model": Hostile()}, folder / "pytorch_model.bin")
    assert export(folder, "onnx", tmp_path / "out") == 2
    assert "pytorch_model.bin is not read: it holds objects, and reading them would run code; where you trust it, " in (
        capsys.readouterr().err
    )
    (folder / "pytorch_model.bin").rename(folder / "pruned_model.pt")
    assert export(folder, "onnx", tmp_path / "out") == 2
    assert "pruned_model.pt is not read: it holds objects" in capsys.readouterr().err
    (folder / "another.pt").write_bytes((folder / "pruned_model.pt").read_bytes())
    assert export(folder, "onnx", tmp_path / "out") == 2
    assert "another.pt is not read: it is one of 2, and transformers' weights are named" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_the_folders_code_runs_only_with_the_flag(
    made: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, _ = made(nemotron_nas)
    touched = tmp_path / "touched"
    (folder / "remote.py").write_text(f"import pathlib\npathlib.Path({str(touched)!r}).touch()\n")
    assert export(folder, "onnx", tmp_path / "out") == 0
    assert not touched.exists()
    assert export(folder, "onnx", tmp_path / "out2", "--trust-remote-code") == 0
    assert touched.exists()
    assert "not compared with its original, which does not run here: " in capsys.readouterr().out


def mutate(folder: Path, seed: int) -> None:
    """Damage a folder: bytes, settings, names, shapes, or whole tensors."""
    chance = random.Random(seed)
    kinds = (".json", ".safetensors", ".bin", ".gguf")
    file = chance.choice(sorted(path for path in folder.rglob("*") if path.suffix in kinds))
    match chance.randrange(6 if file.suffix == ".safetensors" else 2):
        case 0:
            file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])
        case 1:
            data = bytearray(file.read_bytes())
            for _ in range(chance.randrange(1, 30)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            file.write_bytes(data)
        case how:
            tensors = load_file(file)
            name = chance.choice(sorted(tensors))
            tensor = tensors.pop(name)
            if how == 3:
                tensors[name + chance.choice(["_x", ".lora_A", ".0"])] = tensor
            elif how == 4:
                tensors[name] = tensor[: chance.randrange(len(tensor))].clone()
            elif how == 5:
                tensors[name] = tensor.flatten()[None].clone()
            save_file(tensors, file)
    if chance.random() < 0.3 and file.suffix != ".gguf" and file.name != "config.json":
        config = json.loads((folder / "config.json").read_text())
        name = chance.choice(sorted(config))
        change_config(folder, **{name: chance.choice([-1, "x", [], {}, 10**9, 0.5])})


def check_mutations(seeds: range, source: Path, tmp_path: Path) -> int:
    """Expect an import or one line from every damaged copy of `source`, and no file beside it. Returns the refusals."""
    folder = source.parent if source.suffix == ".gguf" else source
    refused: list[str] = []
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for seed in seeds:
        for path, data in whole.items():
            path.write_bytes(data)
        mutate(folder, seed)
        before = sorted(tmp_path.rglob("*"))
        try:
            load_source(str(source))
        except EfficientLLMError as error:
            refused.append(str(error))
        assert not any("\n" in line for line in refused), seed
        assert sorted(tmp_path.rglob("*")) == before, seed
    return len(refused)


def test_damaged_foreign_folder_gives_one_line(made: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = made(llm_pruner)
    assert check_mutations(range(20), folder, tmp_path) > 15


@pytest.mark.parametrize("maker", [flap, gaps, puzzletron])
def test_damaged_folders_of_every_layout_give_one_line(
    maker: Callable[[Path], torch.Tensor], made: Callable[..., Any], tmp_path: Path
) -> None:
    """Safetensors, a pickle, and a file for each block with an index."""
    folder, _ = made(maker)
    assert check_mutations(range(1000, 1050), folder, tmp_path) > 40


def test_damaged_gguf_gives_one_line(made: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = made(flap)
    assert export(folder, "gguf", tmp_path / "gguf" / "file", "--quantize", "f32", "--no-verify") == 0
    path = tmp_path / "gguf" / "model.gguf"
    (tmp_path / "gguf" / "file" / "model.gguf").rename(path)
    shutil.rmtree(tmp_path / "gguf" / "file")
    assert check_mutations(range(2000, 2030), path, tmp_path) > 10


def expect_reading(folder: Path, expected: torch.Tensor) -> None:
    """Expect the logits of the tool's model from an import."""
    model: Any = load_source(str(folder))[0]
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS, use_cache=False).logits[0], expected, atol=1e-5, rtol=1e-5)


STRAY = {  # the first is of microsoft/TransformerCompression 6b12cde
    "model.layers.0.attn_shortcut_Q": "SliceGPT's rotations between blocks",
    "model.layers.0.self_attn.q_u_proj.weight": "the low-rank factors of a matrix",
    "model.layers.0.self_attn.q_proj.lora_A.default.weight": "LoRA adapters",
    "model.layers.0.mlp.up_proj.weight_mask": "masks beside the weights (2:4 or unstructured sparsity)",
    "model.layers.0.mlp.up_proj.bitmask": "packed 2:4 sparse weights",
    "model.layers.0.mlp.experts.0.up_proj.weight": "a mixture of experts",
    "model.layers.0.self_attn.q_proj.qweight": "quantised weights",
    "model.layers.0.mlp.up_proj.weight_scale_inv": "quantised weights",
    "model.layers.0.mlp.up_proj.input_quantizer._amax": "quantised weights",
    "model.layers.0.self_attn.sinks": "no part of llama",
    "model.layers.0.self_attn.q_norm.weight": "no part of llama",
    "model.layers.0.input_layernorm.bias": "no part of llama",
    "lm_head.bias": "no part of llama",
}


@pytest.mark.parametrize("maker", [small, llm_pruner])
@pytest.mark.parametrize("name", STRAY)
def test_reader_refuses_tensors_that_no_part_reads(
    name: str, maker: Callable[[Path], torch.Tensor], made: Callable[..., Any]
) -> None:
    folder, _ = made(maker)
    rename(folder, lambda tensors: {**tensors, name: torch.ones(2, 2)})
    with pytest.raises(ModelError, match=re.escape(f"{name} belongs to {STRAY[name]}")):
        load_source(str(folder))


def test_reader_refuses_stray_tensors_of_irregular_folders(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(tiny_architecture())
    rename(folder, lambda tensors: {**tensors, "lm_head.bias": torch.ones(400)})
    with pytest.raises(ModelError, match=r"has no tensor lm_head\.bias"):
        load_source(str(folder))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attention.masked_bias", "position_ids"]
)
def test_reader_ignores_buffers_that_the_config_determines(name: str, made: Callable[..., Any]) -> None:
    folder, expected = made(small)
    rename(folder, lambda tensors: {**tensors, name: torch.ones(8)})
    expect_reading(folder, expected)


def test_reader_keeps_the_groups_of_the_heads_that_are_left(made: Callable[..., Any]) -> None:
    """Two heads of four are left over two key/value heads, and both read the second one."""

    def cut(folder: Path) -> torch.Tensor:
        model = stock_model(num_attention_heads=4, num_key_value_heads=2)
        attention, left = model.model.layers[0].self_attn, channels([2, 3])
        attention.o_proj.weight.data[:, channels([0, 1])] = 0
        expected = logits(model)
        keep(attention.q_proj, left)
        keep(attention.o_proj, columns=left)
        save_without_run(model, folder)
        change_config(folder, pruned_heads={"0": [0, 1]})
        return expected

    folder, expected = made(cut)
    expect_reading(folder, expected)
    change_config(folder, pruned_heads={"0": [1, 2]})
    with pytest.raises(AssertionError):
        expect_reading(folder, expected)


@pytest.mark.parametrize("layers", ["equal", "unequal"])
def test_a_stored_head_counts_more_than_a_tied_flag(layers: str, made: Callable[..., Any]) -> None:
    def untied(folder: Path) -> torch.Tensor:
        model = stock_model()
        if layers == "unequal":
            keep_ffn(model.model.layers[1], 70)
        return save(model, folder, tie_word_embeddings=True)

    folder, expected = made(untied)
    expect_reading(folder, expected)
    rename(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    tied: Any = load_source(str(folder))[0]
    assert tied.config.tie_word_embeddings


@pytest.mark.parametrize("stated", [2, 3, 10])
def test_reader_takes_the_number_of_layers_from_the_tensors(stated: int, made: Callable[..., Any]) -> None:
    folder, expected = made(small)
    change_config(folder, num_hidden_layers=stated)
    expect_reading(folder, expected)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_reader_accepts_removed_layers_without_layer_types(family: str, made: Callable[..., Any]) -> None:
    """Configurations from before transformers 4.53 have no layer_types."""

    def cut(folder: Path) -> torch.Tensor:
        model = stock_model(family)
        del model.model.layers[2]
        return save(model, folder, num_hidden_layers=4, layer_types=None)

    expect_reading(*made(cut))


def test_export_ends_with_facts_that_shapes_do_not_prove(
    made: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four of eight heads are left over four key/value heads. Two, one, one and none of a group look the same."""

    def cut(folder: Path) -> torch.Tensor:
        model = stock_model()
        attention = model.model.layers[0].self_attn
        keep(attention.q_proj, channels([0, 1, 2, 4]))
        keep(attention.o_proj, columns=channels([0, 1, 2, 4]))
        attention.num_key_value_groups = 1
        return save(model, folder, head_dim=None)

    folder, _ = made(cut)
    change_config(folder, sliding_window=32)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CodeLlamaTokenizer"}')  # would add tokens
    facts = [
        "query over key/value heads are read as 4 over 4 instead of 8 over 4, which is right only if every group",
        "head_dim 16 is only computed (hidden_size / heads of config.json); if the tool changed one",
        "the context ends after 32 of ",
    ]
    assert export(folder, "onnx", tmp_path / "out", "--quantize", "f32") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("artefact: ")
    limits = "; ".join(Manifest.read(tmp_path / "out").limits)
    assert all(fact in last and fact in limits for fact in facts)


def test_weights_with_nan_are_named(made: Callable[..., Any], tmp_path: Path, capsys: Any) -> None:
    folder, _ = made(llm_pruner)
    rename(folder, lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"] * float("nan")})
    assert export(folder, "onnx", tmp_path / "out") == 2
    assert "tensor model.norm.weight holds NaN or infinite numbers" in capsys.readouterr().err


def test_export_ends_with_parts_that_were_not_compared(
    made: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made(TOOLS["openelm"])
    assert export(folder, "onnx", tmp_path / "out", "--no-verify") == 0
    ending = "; converted, not compared with its original; not verified"
    assert capsys.readouterr().out.splitlines()[-1].endswith(ending)
