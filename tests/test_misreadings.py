"""A deliberate error in each setting that the exporters read is refused by every target and type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from export_cases import BITS, MISREADINGS, Case, generate, misread, possible_misreadings
from exporting import export
from tiny import UNEQUAL, tiny_architecture
from training import ERRORS

from efficientllm.export import reading, verification
from efficientllm.export.checkpoint import Checkpoint

TYPES = {"gguf": BITS["gguf"], "onnx": BITS["onnx"], "hf-uniform": ("f32",)}
"""Target -> its types here. `python -m tests.tools.export_cases --misread` has all targets."""
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}
FAMILIES = {"factor": ("llama", LINEAR), "rotated channels": ("gpt_neox", {})}
FAMILIES |= dict.fromkeys(("window", "no window", "factor of the embedding", "eps of q and k"), ("gemma3_text", {}))
"""Misreading -> family and settings of a model in which it matters; llama for the others."""


def case(name: str, quantize: str) -> Case:
    """Return a model of random weights for a misreading."""
    family, settings = FAMILIES.get(name, ("llama", {}))
    layers = tiny_architecture(family, UNEQUAL[:2]).layers
    weights = {"weights": "random", "quantize": quantize, "flags": {}, "is_calibrated": False, "head_dim": 16}
    shape = {"family": family, "layers": layers, "settings": settings, "hidden_size": 64, "vocab_size": 400}
    return replace(generate("onnx", 1, 0), **weights, **shape)


@pytest.mark.parametrize(("target", "quantize"), [(target, kind) for target, kinds in TYPES.items() for kind in kinds])
def test_export_refuses_each_misread_setting(target: str, quantize: str, tmp_path: Path) -> None:
    for name in MISREADINGS:
        outcome = misread(target, case(name, quantize), tmp_path / name, name)
        assert outcome.kind == "right", (name, outcome)


def test_logits_alone_refuse_a_misread_rope(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allowance of an exact file comes from torch's own frequencies and has a cap."""
    monkeypatch.setattr(reading, "check_reading", lambda *_: None)
    for target in ("gguf", "onnx"):
        outcome = misread(target, case("theta", "f32"), tmp_path / target, "theta")
        assert "logits differ" in outcome.detail, outcome


def test_an_allowance_has_a_cap() -> None:
    logits = np.zeros((2, 4), np.float32)
    assert verification.own_limit(logits, lambda: 7.0) == verification.MAX_OWN_DIFFERENCE
    assert verification.own_limit(logits, lambda: 1e-3) == pytest.approx(2e-3)


def test_each_misreading_matters_in_its_model(save_tiny: Callable[..., Path]) -> None:
    for name in MISREADINGS:
        family, settings = FAMILIES.get(name, ("llama", {}))
        folder = save_tiny(tiny_architecture(family, UNEQUAL[:2]), **settings)
        assert name in possible_misreadings(Checkpoint(folder, family))


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight", "input_layernorm.weight"])
def test_a_changed_tensor_is_named(
    name: str, save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
) -> None:
    read = Checkpoint.tensor
    monkeypatch.setattr(
        Checkpoint, "tensor", lambda self, each: read(self, each) * (1.001 if each.endswith(name) else 1)
    )
    assert export(save_tiny(tiny_architecture()), "onnx", tmp_path / "out", "--quantize", "int8") == 2
    assert f"tensor model.layers.0.{name} is read as other numbers" in capsys.readouterr().err
