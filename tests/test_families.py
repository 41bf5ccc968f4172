"""Families that are not Llama with another name: each is trained, stopped, resumed, stored and exported everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import TOKENS, export
from pruning import some_removal
from shared import made_once
from tiny import SETTINGS, SIMILAR, tiny_architecture, tiny_model
from training import ERRORS, command, run, stopped_and_resumed, without
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from efficientllm.export.gguf.exporter import table_gelu
from efficientllm.export.gguf.probe import probe
from efficientllm.export.verification import torch_logits
from efficientllm.runtime.base.errors import ModelError
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.train.compute.loss import frozen_copy
from efficientllm.train.evaluation.evaluate import ComputeConfig, MeasureConfig, evaluate
from efficientllm.train.model import modeling_efficientllm as modeling
from efficientllm.train.model.architecture import FAMILIES, Architecture, LayerShape
from efficientllm.train.model.irregular import architecture_of, build, save_checkpoint
from efficientllm.train.model.source import load_for_inference, load_source
from efficientllm.train.model.tensors import block_norms
from efficientllm.train.pruning.surgery import remove_groups

NEW = [family for family in FAMILIES if family not in SIMILAR]

LAYERS = (LayerShape(4, 2, 96), LayerShape(0, 0, 64), LayerShape(2, 1, 75), LayerShape(4, 4, 0))

IRREGULAR_IN_GGUF = {**dict.fromkeys(("llama", "mistral", "qwen2", "llama_bias", "olmo"), "deci"), "qwen3": "openelm"}
"""Family -> architecture that holds it as it is; the others are zero-padded to their own."""

Folder = Callable[..., Path]


FEW = (LayerShape(4, 2, 75), LayerShape(2, 2, 0))
"""Two layers that show every part, with FEW_SETTINGS, where an export takes seconds a layer. The first is enough for
families whose blocks are Llama's with other norms or biases: test_export_executorch.py has that without an FFN."""
FEW_SETTINGS = {"gemma3_text": {"sliding_window_pattern": 2}, "smollm3": {"no_rope_layer_interval": 2}}


@pytest.fixture(scope="session")
def irregular(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Folder:
    """irregular(family, is_small) -> folder of a tiny model of unequal layers, some without a block, norms and biases
    random."""

    def folder(family: str, is_small: bool = False) -> Path:
        def make(path: Path) -> None:
            few = FEW if family in (*FEW_SETTINGS, "gpt_neox") else FEW[:1]
            layers, settings = (few, FEW_SETTINGS.get(family, {})) if is_small else (LAYERS, {})
            save_checkpoint(tiny_model(tiny_architecture(family, layers), **settings), tokenizer, path)

        return made_once(tmp_path_factory, f"irregular-{family}-{is_small}", make)

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modeling_file_and_the_description_name_the_same_norms(family: str) -> None:
    parts, model = FAMILIES[family], modeling.CAUSAL_LM_CLASSES[family].base_class
    assert (model.attention_norms, model.ffn_norms) == (block_norms(parts, "attention"), block_norms(parts, "ffn"))
    assert (model.layer_norm_tensors is not None) == parts.norm.takes_mean
    assert model.layer_norm_tensors in (None, parts.norm.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("family", NEW)
def test_a_stock_model_is_pruned_distilled_stopped_and_resumed(
    family: str, save_tiny: Callable[..., Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder of the stock class; the run ends where it would have ended, and what it leaves exports."""

    source = save_tiny(tiny_architecture(family, (LayerShape(4, 4, 128),) * 4, head_dim=16))
    assert Architecture.from_folder(source).family == family
    more = ["--distill", "1", "--checkpoint-every", "0", "--tokens", "768"]
    more += ["--prune", "attention,stem", "--weight-update", "obs"]
    resumed = stopped_and_resumed(source, corpus, tmp_path, monkeypatch, *more)
    final = Architecture.from_folder(resumed / "model")
    assert final.family == family
    assert final.hidden_size < 64
    assert final.num_parameters <= 0.6 * Architecture.from_folder(source).num_parameters
    assert export(resumed, "onnx", tmp_path / "onnx", "--quantize", "f32") == 0  # verified against torch


@pytest.mark.parametrize("family", NEW)
def test_teacher_in_bfloat16_gives_nearly_the_same_logits(family: str) -> None:
    model = tiny_model(tiny_architecture(family, LAYERS))
    teacher = frozen_copy(model, torch.bfloat16, torch.device("cpu"))
    with torch.inference_mode():
        p, q = (torch.log_softmax(each(torch.tensor([TOKENS])).logits.float(), -1) for each in (model, teacher))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_uniform_model_without_some_stem_channels_is_stored_as_its_stock_class(
    family: str, tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Other eps, gains and scales than the stock class has move into the weights, but not into a second matrix."""
    model = tiny_model(tiny_architecture(family, (LayerShape(4, 4, 96),) * 4, head_dim=12, tied=tied))
    remove_groups(model, some_removal(architecture_of(model.config), ("stem",), units=2))
    save_checkpoint(model, tokenizer, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    is_stock = FAMILIES[family].norm.has_gain or not tied  # the gain that is missing would untie the head
    assert (type(stock).__name__ == FAMILIES[family].stock_class) == is_stock
    config = json.loads((tmp_path / "config.json").read_text())
    if is_stock:
        del config["rope_parameters"]  # which releases before transformers 5 do not know
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert stock.num_parameters() == architecture_of(model.config).num_parameters
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits
        for each in (stock, older):
            torch.testing.assert_close(each(torch.tensor([TOKENS])).logits, expected, atol=1e-5, rtol=1e-5)


LOAD_ELSEWHERE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "efficientllm":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

assert AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=True).decode([5, 6])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert "efficientllm" not in sys.modules
    with torch.inference_mode():
        torch.save(model(torch.load(sys.argv[1])).logits, f"{sys.argv[1]}.{model.config.model_type}")
"""


@pytest.mark.slow
def test_folders_load_without_efficientllm(irregular: Folder, tmp_path: Path) -> None:
    torch.save(torch.tensor([TOKENS]), tmp_path / "tokens.pt")
    folders = [str(irregular(family)) for family in FAMILIES]
    command = [sys.executable, "-c", LOAD_ELSEWHERE, str(tmp_path / "tokens.pt"), *folders]
    subprocess.run(command, check=True, env={"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path), "PATH": ""})
    for family, folder in zip(FAMILIES, folders, strict=True):
        here = AutoModelForCausalLM.from_pretrained(folder)
        with torch.inference_mode():
            assert torch.equal(
                torch.load(tmp_path / f"tokens.pt.efficientllm_{family}"), here(torch.tensor([TOKENS])).logits
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_equals_torch_in_the_layout_that_holds_it(
    family: str, irregular: Folder, tmp_path: Path, capsys: ERRORS
) -> None:
    assert export(irregular(family), "gguf", tmp_path / "gguf", "--quantize", "f32", "--no-verify") == 0
    activation = table_gelu if FAMILIES[family].activation.startswith("gelu") else None
    ours = torch_logits(irregular(family), TOKENS, activation)
    theirs = probe(tmp_path / "gguf" / "model.gguf", TOKENS).logits[0]
    assert np.abs(ours - theirs).max() < 1e-3
    said = capsys.readouterr().out
    layout = IRREGULAR_IN_GGUF.get(family, FAMILIES[family].gguf)
    assert f"llama.cpp architecture {layout}," in said
    assert ("--layout uniform" in said) == (family not in IRREGULAR_IN_GGUF)


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_equals_torch(family: str, irregular: Folder, tmp_path: Path) -> None:
    assert export(irregular(family), "onnx", tmp_path / "onnx", "--quantize", "f32", "--no-verify") == 0
    expect_engine_equals_torch(irregular(family), tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("family", NEW)
def test_executorch_equals_torch(family: str, irregular: Folder, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="executorch is not installed")
    flags = ("--quantize", "f32", "--max-context", "64", "--no-verify")
    assert export(irregular(family, True), "executorch", tmp_path / "pte", *flags) == 0
    expect_engine_equals_torch(irregular(family, True), tmp_path / "pte")


def expect_engine_equals_torch(checkpoint: Path, artefact: Path) -> None:
    """Prefill, then token by token, past every window."""
    expected = torch_logits(checkpoint, TOKENS)
    engine = load_engine(artefact, EngineOptions(threads=1, context=64))
    rows = [engine.prefill(TOKENS[:24]), *(engine.decode(token) for token in TOKENS[24:])]
    assert np.abs(np.stack(rows) - expected[23:]).max() < 1e-3
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_hf_uniform_equals_torch(family: str, tied: bool, save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A hidden size that must be padded."""
    checkpoint = save_tiny(tiny_architecture(family, LAYERS, hidden_size=53, tied=tied))
    assert export(checkpoint, "hf-uniform", tmp_path / "uniform", "--no-verify") == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "uniform")
    assert type(stock).__name__ == FAMILIES[family].stock_class
    assert not list((tmp_path / "uniform").glob("*.py"))
    assert not {"per_layer_config", "model_file"} & json.loads((tmp_path / "uniform/config.json").read_text()).keys()
    assert np.abs(torch_logits(tmp_path / "uniform", TOKENS) - torch_logits(checkpoint, TOKENS)).max() < 1e-4


@pytest.mark.parametrize("rope", ["yarn", "dynamic"])
def test_ropes_that_read_the_number_of_heads_work_in_unequal_layers(rope: str, tmp_path: Path) -> None:
    parameters = {"rope_type": rope, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    stock = AutoConfig.for_model(
        "llama", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        head_dim=16, num_key_value_heads=2, max_position_embeddings=256, rope_parameters=parameters,
    )  # fmt: skip
    shape = replace(architecture_of(stock), layers=(LayerShape(4, 2, 96), LayerShape(2, 1, 64)))
    model: Any = build(stock, shape).eval()
    positions = torch.arange(300)[None]
    expected = AutoModelForCausalLM.from_config(stock).model.rotary_emb(torch.zeros(1, 300, 64), positions)
    torch.testing.assert_close(model.model.rotary_emb(torch.zeros(1, 300, 64), positions), expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_for_inference(tmp_path)(positions % 128).logits, model(positions % 128).logits)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "no part describes a mixture of experts"),
        ({"model_type": "mamba", "state_size": 16}, "no part describes a state-space layer"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "no part describes an encoder with cross-attention"),
        ({"model_type": "gemma3", "vision_config": {"depth": 2}}, "no part describes a vision or audio tower"),
        ({"model_type": "gpt_neox", "use_parallel_residual": False}, "use_parallel_residual=False is not supported"),
        ({"model_type": "llama", "hidden_act": "relu"}, "hidden_act='relu' is not supported; only silu is"),
    ],
)
def test_refusal_names_settings_that_no_part_describes(config: dict[str, Any], part: str) -> None:
    with pytest.raises(ModelError, match=part):
        Architecture.from_hf_config(config)


def stock_folder(family: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """What transformers itself writes of a random model of the stock class."""
    names = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 96}
    more = {} if FAMILIES[family].heads_fill_hidden else {"num_key_value_heads": 2}
    special = {
        "vocab_size": 400,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if not FAMILIES[family].derives_head_dim:
        more["head_dim"] = 32
    torch.manual_seed(0)
    settings = {**names, **special, **more, **SETTINGS.get(family, {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(FAMILIES[family].model_type or family, **settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", NEW)
def test_reader_accepts_folders_of_transformers(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """By the exporters, which read tensors themselves, and in training, with a config.json that has no old names."""
    folder = stock_folder(family, tokenizer, tmp_path / "stock")
    assert type(load_for_inference(folder)).__module__.startswith("transformers.")
    assert export(folder, "onnx", tmp_path / "onnx", "--quantize", "f32") == 0  # verified against the stock class
    ours = load_source(str(folder))[0].eval()
    with torch.inference_mode():
        logits = ours(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(logits - torch_logits(folder, TOKENS)).max() < 1e-5


@pytest.mark.parametrize("family", ["gpt_neox", "olmo"])
def test_evaluation_measures_a_stock_folder(
    family: str, tokenizer: PreTrainedTokenizerFast, corpus: Path, tmp_path: Path
) -> None:
    measures = MeasureConfig(tasks=("none",), text=(f"docs={corpus}",), text_tokens=200)
    found = evaluate(stock_folder(family, tokenizer, tmp_path), measures, ComputeConfig())
    assert found.perplexity["docs"].tokens == 200
    assert 200 < found.perplexity["docs"].perplexity < 800  # 400 tokens, random weights


OLDER = {
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 5000},
    "gemma3_text": {"rope_theta": 50000.0, "rope_local_base_freq": 3000.0, "sliding_window_pattern": 3},
    "smollm3": {"rope_theta": 50000.0, "no_rope_layer_interval": 3},
}
"""Settings of config.json as releases before transformers 5 wrote them."""


@pytest.mark.parametrize("family", OLDER)
def test_older_config_has_the_defaults_of_transformers(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = stock_folder(family, tokenizer, tmp_path / "stock")
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "no_rope_layers", "_sliding_window_pattern", "tie_word_embeddings"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**config, **OLDER[family]}), encoding="utf-8")
    assert export(folder, "onnx", tmp_path / "onnx", "--quantize", "f32") == 0  # verified against the stock class


def test_an_importance_matrix_fits_a_padded_file(irregular: Folder, corpus: Path, tmp_path: Path) -> None:
    """Heads of unequal groups: zeros stand between the inputs of o_proj."""
    flags = ("--quantize", "q4_k_m", "--calibrate", str(corpus))
    assert export(irregular("olmo2"), "gguf", tmp_path / "gguf", *flags) == 0


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        ("gpt_neox", ["--recover", "least-squares"], "--recover least-squares fits matrices that add to the residual"),
        ("olmo2", ["--recover", "least-squares"], "those of olmo2 do not"),
        ("gpt_neox", ["--target-bytes", "1000000"], "no architecture for irregular layers of gpt_neox"),
    ],
)
def test_settings_that_a_family_excludes_give_one_line(
    family: str, flags: list[str], message: str, irregular: Folder, corpus: Path, tmp_path: Path, capsys: ERRORS
) -> None:
    arguments = without(command(irregular(family), corpus, tmp_path / "run"), "--target-ratio")
    target = [] if "--target-bytes" in flags else ["--target-ratio", "0.8"]
    assert run([*arguments, *target, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", ["olmo", "smollm3"])
def test_least_squares_recovery_of_families_that_it_takes(
    family: str, save_tiny: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    source = save_tiny(tiny_architecture(family, (LayerShape(4, 4, 128),) * 4, head_dim=16))
    more = ["--recover", "least-squares", "--recover-tokens", "512", "--tokens", "384", "--checkpoint-every", "0"]
    assert run(command(source, corpus, tmp_path / "run", *more)) == 0
