"""What people do with a checkpoint in libraries of others; the limits are named in docs/checkpoints.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import UNEQUAL, tiny_architecture
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from efficientllm.train.model.architecture import LayerShape

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
