from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny import LLAMA3_ROPE, UNEQUAL, tiny_architecture, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from efficientllm.runtime.base.errors import ModelError
from efficientllm.train.model.architecture import FAMILIES, LayerShape
from efficientllm.train.model.irregular import to_irregular
from efficientllm.train.model.source import load_for_inference, load_source

GAPS = (LayerShape(0, 0, 64), LayerShape(2, 1, 0), LayerShape(4, 2, 96))
TOKENS = torch.randint(0, 400, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [UNEQUAL, GAPS], ids=["unequal", "gaps"])
def test_caches_and_attention_implementations_agree(family: str, layers: tuple[LayerShape, ...]) -> None:
    model = tiny_model(tiny_architecture(family, layers))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(TOKENS)}
    plain = model.generate(TOKENS, use_cache=False, **settings)
    assert torch.equal(plain, model.generate(TOKENS, **settings))
    assert torch.equal(plain, model.generate(TOKENS, cache_implementation="static", **settings))
    with torch.inference_mode():
        sdpa = model(TOKENS).logits
        model.set_attn_implementation("eager")
        eager = model(TOKENS, output_attentions=True)
    assert any(weights is not None for weights in eager.attentions)  # eager really ran
    torch.testing.assert_close(sdpa, eager.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("modeling_efficientllm.py", {"torch", "transformers", "collections", "contextlib", "copy", "typing"}),
        ("modeling_mlx.py", {"mlx", "mlx_lm", "dataclasses", "typing"}),
    ],
)
def test_modeling_files_import_only_their_libraries(
    name: str, expected: set[str], save_tiny: Callable[..., Path]
) -> None:
    text = (save_tiny(tiny_architecture()) / name).read_text()
    imports = [
        line.split()[1].split(".")[0] for line in text.splitlines() if line.split()[:1] in (["import"], ["from"])
    ]
    assert set(imports) == expected


def test_old_transformers_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from efficientllm.train.model import modeling_efficientllm

    monkeypatch.setitem(sys.modules, "transformers.integrations.heterogeneity", None)
    code = compile(Path(modeling_efficientllm.__file__).read_text(encoding="utf-8"), "modeling_efficientllm", "exec")
    message = r"layers of unequal width need transformers 5\.14 or newer, and this is .*; run: pip install .*\)$"
    with pytest.raises(ImportError, match=message):
        exec(code, {"__name__": "modeling_efficientllm"})


def test_uniform_model_is_saved_as_plain_llama(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(tiny_architecture(layers=(LayerShape(4, 2, 96),) * 2))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "model_file" not in config
    assert not list(folder.glob("*.py"))
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is LlamaForCausalLM


def test_uniform_model_that_stock_llama_refuses_keeps_its_own_type(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(tiny_architecture(layers=(LayerShape(3, 1, 96),) * 2))  # 64 is not a multiple of 3
    assert json.loads((folder / "config.json").read_text())["model_type"] == "efficientllm_llama"


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_source_becomes_the_same_function(family: str, save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(tiny_architecture(family, (LayerShape(4, 2, 96),) * 2, head_dim=16))
    stock = AutoModelForCausalLM.from_pretrained(folder)
    irregular = cast(Any, load_source(str(folder))[0])
    assert stock.config.model_type == (FAMILIES[family].model_type or family)
    assert irregular.config.model_type == f"efficientllm_{family}"
    assert to_irregular(irregular) is irregular
    with torch.inference_mode():
        assert torch.equal(stock.eval()(TOKENS).logits, irregular.eval()(TOKENS).logits)


def test_llama3_rope_scaling_is_kept(save_tiny: Callable[..., Path]) -> None:
    model = tiny_model(tiny_architecture(), rope_parameters=LLAMA3_ROPE)
    reloaded = AutoModelForCausalLM.from_pretrained(save_tiny(tiny_architecture(), rope_parameters=LLAMA3_ROPE))
    plain = tiny_model(tiny_architecture())
    with torch.inference_mode():
        logits = model(TOKENS).logits
        assert torch.equal(logits, reloaded(TOKENS).logits)
        assert not torch.allclose(logits, plain(TOKENS).logits)


def test_a_failed_load_leaves_transformers_as_talkative_as_before(tmp_path: Path) -> None:
    from transformers.utils import logging as transformers_logging

    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    before = transformers_logging.get_verbosity()
    with pytest.raises(ModelError, match="Unrecognized model"):
        load_for_inference(tmp_path)
    assert transformers_logging.get_verbosity() == before
