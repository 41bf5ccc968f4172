from __future__ import annotations

import pytest
from tiny import UNEQUAL, tiny_architecture, tiny_model

from efficientllm.runtime.base.errors import ModelError
from efficientllm.train.model.architecture import FAMILIES, Architecture, LayerShape
from efficientllm.train.model.irregular import architecture_of
from efficientllm.train.model.tensors import tensor_names, tensor_shape

GAPS = (LayerShape(0, 0, 64), LayerShape(2, 1, 0), LayerShape(4, 2, 96))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [UNEQUAL, GAPS], ids=["unequal", "gaps"])
def test_counts_and_tensor_table_match_the_model(family: str, tied: bool, layers: tuple[LayerShape, ...]) -> None:
    architecture = tiny_architecture(family, layers, tied=tied)
    model = tiny_model(architecture)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(parameter.numel() for parameter in model.parameters()) == architecture.num_parameters
    assert shapes == {name: tensor_shape(architecture, name) for name in tensor_names(architecture)}


@pytest.mark.parametrize("family", FAMILIES)
def test_survives_the_config_and_json(family: str) -> None:
    architecture = tiny_architecture(family, GAPS)
    assert architecture_of(tiny_model(architecture).config) == architecture
    assert Architecture.from_dict(architecture.to_dict()) == architecture


def test_architecture_refuses_heads_that_groups_do_not_divide() -> None:
    with pytest.raises(ModelError, match="layer 1 has 3 query heads over 2 key/value heads"):
        tiny_architecture(layers=(LayerShape(2, 1, 32), LayerShape(3, 2, 32)))


def test_unsupported_family_names_the_supported_ones() -> None:
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"):
        Architecture.from_hf_config({"model_type": "gpt2"})
