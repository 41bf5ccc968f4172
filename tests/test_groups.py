"""The table of group kinds, and what must stay in step with it."""

from __future__ import annotations

import pytest
from tiny import tiny_architecture

from efficientllm.train.config.pruning import PruneConfig
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.groups import KIND_OF_AXIS, KINDS, counts
from efficientllm.train.model.tensors import axes_of, tensor_names
from efficientllm.train.pruning.saliency import FOLDS

LAYERS = (LayerShape(6, 2, 96), LayerShape(0, 0, 64), LayerShape(8, 4, 0))


def test_every_kind_has_its_own_score_and_axis() -> None:
    assert set(FOLDS) == {name for name, kind in KINDS.items() if kind.scored_axes}
    assert len(KIND_OF_AXIS) == len(KINDS)
    architecture = tiny_architecture()
    axes = {axis for name in tensor_names(architecture) for axis in axes_of(name, architecture)[1]}
    assert {axis for kind in KINDS.values() for axis in (kind.axis, *kind.scored_axes)} <= axes


@pytest.mark.parametrize(
    ("prune", "kinds"),
    [(("attention",), ("kv_group", "query_head")), (("stem", "ffn"), ("ffn", "stem")), (("none",), ())],
)
def test_the_flag_names_the_kinds(prune: tuple[str, ...], kinds: tuple[str, ...]) -> None:
    assert PruneConfig(prune=prune).kinds == kinds


@pytest.mark.parametrize("name", KINDS)
def test_shrinking_by_a_step_takes_a_step(name: str) -> None:
    architecture, kind = tiny_architecture(layers=LAYERS), KINDS[name]
    for layer, count in enumerate(counts(name, architecture)):
        step = min(count, kind.step(architecture, layer, 32))
        smaller = kind.shrink(architecture, layer, step)
        assert kind.count(smaller, layer) == count - step
        assert kind.least(architecture, layer, architecture) == count
        others = {other for other in KINDS if counts(other, smaller) != counts(other, architecture)}
        expected = {name, "query_head"} if name == "kv_group" else {name}
        assert others == (expected if step else set())


def test_a_layer_without_a_block_has_none_of_its_groups() -> None:
    architecture = tiny_architecture(layers=LAYERS)
    assert {name: counts(name, architecture) for name in KINDS} == {
        "kv_group": [2, 0, 4],
        "query_head": [6, 0, 8],
        "ffn": [96, 64, 0],
        "stem": [64],
        "vocabulary": [400],
    }
