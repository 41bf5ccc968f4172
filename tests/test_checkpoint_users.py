"""What people do with a checkpoint in libraries of others; the limits are named in docs/checkpoints.md."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import UNEQUAL, tiny_architecture
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from efficientllm.export.cli import export
from efficientllm.runtime.base.errors import ModelError, UsageError
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.foreign_configs import ImportOptions
from efficientllm.train.model.source import load_for_inference, load_source

TOKENS = torch.tensor([[5, 17, 230, 41]])
SaveTiny = Callable[..., Path]


def test_a_tool_that_asks_for_one_width_is_refused_or_gets_the_widest(save_tiny: SaveTiny) -> None:
    folder = save_tiny(tiny_architecture())
    config: Any = AutoConfig.from_pretrained(folder)
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.num_attention_heads
    assert [layer.num_attention_heads for layer in config.per_layer_config] == [4, 2, 2]
    config = AutoConfig.from_pretrained(folder, allow_global_per_layer_attribute_access=True)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 128)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits)


def test_threads_load_one_model_after_the_other(save_tiny: SaveTiny) -> None:
    """transformers' loading ties no head while another thread loads."""
    folder = save_tiny(tiny_architecture(tied=True))
    with torch.inference_mode():
        expected = load_for_inference(folder)(TOKENS).logits
    with ThreadPoolExecutor(2) as pool:
        for model in pool.map(load_for_inference, [folder] * 4):
            with torch.inference_mode():
                assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_peft_adapts_all_linear_layers(save_tiny: SaveTiny) -> None:
    """And its default, a table of model types, asks for them."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    folder = save_tiny(tiny_architecture())
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(task_type="CAUSAL_LM"))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).eval()
    assert len(adapted.peft_config) == 1
    with torch.inference_mode():
        expected = adapted(TOKENS).logits
        merged = adapted.merge_and_unload()(TOKENS).logits
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def adapted(save_tiny: SaveTiny, tmp_path: Path) -> tuple[Path, Path, Any]:
    """(a folder of a model, the folder of an adapter of it, its logits with the adapter)"""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    folder = save_tiny(tiny_architecture(layers=(LayerShape(4, 2, 128),) * 3))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        return folder, tmp_path / "adapter", model(TOKENS).logits


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_merged_into_the_source(adapted: tuple[Path, Path, Any]) -> None:
    folder, adapter, expected = adapted
    model, _ = load_source(str(folder), "", ImportOptions(adapter=str(adapter)))
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
        assert (AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits - expected).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_exported_with_its_base(adapted: tuple[Path, Path, Any], tmp_path: Path) -> None:
    folder, adapter, expected = adapted
    export(folder, "gguf", tmp_path / "out", quantize="f32", adapter=str(adapter))
    engine = load_engine(tmp_path / "out", EngineOptions(threads=1))
    found = torch.from_numpy(np.concatenate(list(engine.evaluate(TOKENS[0].tolist(), 0))))
    torch.testing.assert_close(found, expected[0], atol=0.1, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verify", [True, False])
def test_export_refuses_an_adapter_in_the_wrong_place(
    verify: bool, adapted: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    """Trainers save an adapter beside its base. transformers loads both, and a reader of the weights only one."""
    folder, adapter, _ = adapted
    with pytest.raises(UsageError, match="an adapter without its model; give the model and this folder as --adapter"):
        export(adapter, "onnx", tmp_path / "out", verify=verify)
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    with pytest.raises(ModelError, match="holds a model and an adapter of it"):
        export(folder, "onnx", tmp_path / "out", verify=verify)
    with pytest.raises(ModelError, match="holds a model and an adapter of it"):
        load_source(str(folder), "", ImportOptions(adapter=str(folder)))


@pytest.mark.filterwarnings("ignore")
def test_loader_refuses_an_adapter_of_learned_tokens(save_tiny: SaveTiny, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    folder = save_tiny(tiny_architecture(layers=(LayerShape(4, 2, 128),) * 3))
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="adapter of type PROMPT_TUNING, which adds tokens and no weights to merge"):
        load_source(str(folder), "", ImportOptions(adapter=str(tmp_path / "adapter")))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_does_not_fit_is_refused(adapted: tuple[Path, Path, Any], save_tiny: SaveTiny) -> None:
    _, adapter, _ = adapted
    other = save_tiny(tiny_architecture(hidden_size=32, layers=(LayerShape(4, 2, 64),) * 3))
    with pytest.raises(ModelError, match=r"--adapter .*: cannot be loaded: "):
        load_source(str(other), "", ImportOptions(adapter=str(adapter)))
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="names no peft_type"):
        export(other, "gguf", adapter, quantize="f32", adapter=str(adapter))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match="no adapter_config"):
        load_source(str(other), "", ImportOptions(adapter=str(adapter)))


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_takes_widths_that_are_multiples_of_64(save_tiny: SaveTiny) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    layers = tuple(LayerShape(layer.num_attention_heads, layer.num_key_value_heads, 128) for layer in UNEQUAL)
    folder = save_tiny(tiny_architecture(layers=layers))
    few: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    load = AutoModelForCausalLM.from_pretrained
    with torch.inference_mode():
        expected = load(folder)(TOKENS).logits
        logits = load(folder, quantization_config=few, device_map="cpu", dtype=torch.bfloat16)(TOKENS).logits.float()
    assert torch.nn.functional.cosine_similarity(logits, expected, dim=-1).min() > 0.8
