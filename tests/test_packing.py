"""Models that lost blocks: closed up when they are stored, and what every export makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exporting import export
from tiny import tiny_architecture, tiny_model
from transformers import PreTrainedTokenizerFast

from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.train.model.architecture import FAMILIES, Architecture, LayerShape
from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.model.source import load_for_inference
from efficientllm.train.model.tensors import packed, tensor_names

WHOLE, NO_ATTENTION, NO_FFN, NOTHING = (
    LayerShape(4, 2, 96),
    LayerShape(0, 0, 64),
    LayerShape(2, 1, 0),
    LayerShape(0, 0, 0),
)
TOKENS = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(3))

CASES = {
    "nothing is missing": ((WHOLE, WHOLE), (WHOLE, WHOLE), ((0, 0), (1, 1))),
    "an empty layer": ((WHOLE, NOTHING, WHOLE), (WHOLE, WHOLE), ((0, 0), (2, 2))),
    "empty at both ends": ((NOTHING, WHOLE, NOTHING), (WHOLE,), ((1, 1),)),
    "an FFN moves up to an attention": ((NO_FFN, NOTHING, NO_ATTENTION), (LayerShape(2, 1, 64),), ((0, 2),)),
    "an attention does not pass an FFN": ((NO_ATTENTION, NO_FFN), (NO_ATTENTION, NO_FFN), ((0, 0), (1, 1))),
    "an FFN does not pass an FFN": ((WHOLE, NO_ATTENTION), (WHOLE, NO_ATTENTION), ((0, 0), (1, 1))),
    "two attentions stay two": ((NO_FFN, NO_FFN, WHOLE), (NO_FFN, NO_FFN, WHOLE), ((0, 0), (1, 1), (2, 2))),
    "nothing at all": ((NOTHING, NOTHING), (NOTHING,), ((0, 0),)),
}

HOLES = {
    "no attention in the first layer": (NO_ATTENTION, WHOLE, NOTHING, WHOLE),
    "no FFN, and the next is no attention": (WHOLE, NO_FFN, NO_ATTENTION, WHOLE),
    "no FFN in the last layer": (WHOLE, NOTHING, NO_FFN),
    "one attention, one FFN": (NOTHING, NO_FFN, NOTHING, NO_ATTENTION),
    "equal layers around a hole": (WHOLE, NOTHING, NOTHING, WHOLE),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_move_together(case: str) -> None:
    layers, expected, origins = CASES[case]
    found = packed(tiny_architecture(layers=layers))
    assert found.architecture.layers == expected
    assert found.origins == origins


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_moves_once(family: str, case: str) -> None:
    architecture = tiny_architecture(family, CASES[case][0], tied=False)
    found = packed(architecture)
    assert list(found.names) == tensor_names(found.architecture)
    assert sorted(found.names.values()) == sorted(tensor_names(architecture))
    assert found.architecture.num_parameters == architecture.num_parameters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", HOLES)
def test_a_stored_model_is_the_same_function(
    family: str, case: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(tiny_architecture(family, HOLES[case]))
    save_checkpoint(model, tokenizer, tmp_path)
    loaded = load_for_inference(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-4)
        steps = loaded.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False)
        torch.testing.assert_close(
            steps, loaded.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False, use_cache=False)
        )
    assert (
        Architecture.from_folder(tmp_path).layers == packed(tiny_architecture(family, HOLES[case])).architecture.layers
    )


def test_equal_layers_around_a_hole_are_a_plain_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    save_checkpoint(tiny_model(tiny_architecture(layers=HOLES["equal layers around a hole"])), tokenizer, tmp_path)
    assert type(load_for_inference(tmp_path)).__name__ == "LlamaForCausalLM"
    assert not list(tmp_path.glob("*.py"))


def check_export(case: str, target: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Exactly what torch says of the model with its holes, in a file of fewer layers."""
    architecture = tiny_architecture(layers=HOLES[case])
    save_checkpoint(tiny_model(architecture), tokenizer, folder / "checkpoint")
    more = () if target == "hf-uniform" else ("--quantize", "f32")
    assert export(folder / "checkpoint", target, folder / "out", *more) == 0
    manifest = Manifest.read(folder / "out")
    assert manifest.verification["exact"]["max_logit_difference"] < 1e-3
    assert len(manifest.architecture["intermediate_size"]) == len(packed(architecture).architecture.layers)


@pytest.mark.parametrize("target", ["gguf", "onnx", "hf-uniform"])
@pytest.mark.parametrize("case", HOLES)
def test_every_hole_exports_exactly(case: str, target: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    check_export(case, target, tokenizer, tmp_path)


def test_a_gguf_has_as_many_blocks_as_are_left(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from gguf import GGUFReader

    check_export("no FFN, and the next is no attention", "gguf", tokenizer, tmp_path)
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["deci.block_count"].contents() == 3
    assert fields["deci.feed_forward_length"].contents() == [96, 64, 96]
