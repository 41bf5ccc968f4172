from __future__ import annotations

import pytest
import torch
from pruning import past, random_scores
from tiny import tiny_architecture

from efficientllm.runtime.base.errors import UsageError
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.groups import KINDS
from efficientllm.train.pruning.rules import SelectionRules, check_floor, smallest_architecture
from efficientllm.train.pruning.selection import compose, select_removal

ALL_KINDS = tuple(KINDS)

LAYERS = (LayerShape(6, 2, 96), LayerShape(6, 2, 96), LayerShape(4, 4, 96))
ARCHITECTURE = tiny_architecture(layers=LAYERS)


def test_takes_the_least_salient_channels_first() -> None:
    scores = random_scores(ARCHITECTURE)
    scores["ffn"][1][:] += 10
    scores["ffn"][1][[3, 50, 51, 90]] = 0.0
    removal = select_removal(ARCHITECTURE, {"ffn": scores["ffn"]}, SelectionRules(("ffn",), 4), 0, stop_before=past(1))
    assert removal.units[0].parts == ((1, (3, 50, 51, 90)),)
    assert removal.after.layers[1].intermediate_size == 92


def test_ranks_by_saliency_per_parameter_across_types() -> None:
    scores = {"kv_group": [torch.ones(2), torch.ones(2), torch.ones(4)], "ffn": [torch.ones(96)] * 3}
    cheap = 3 * 64 * 8  # parameters of 8 channels
    group = 64 * 32 * 8  # 1 key, 1 value, 3 query and 3 output heads
    for layer in range(3):
        scores["kv_group"][layer] *= 100 * group
    scores["kv_group"][0][1] = 8 * group / cheap * 0.99
    rules = SelectionRules(("kv_group", "ffn"), 8)
    first = select_removal(ARCHITECTURE, scores, rules, 0, stop_before=past(1)).units[0]
    assert (first.kind, first.parts) == ("kv_group", ((0, (1,)),))
    scores["kv_group"][0] *= 2
    assert select_removal(ARCHITECTURE, scores, rules, 0, stop_before=past(1)).units[0].kind == "ffn"


@pytest.mark.parametrize("seed", range(5))
def test_down_to_the_floor_and_no_further(seed: int) -> None:
    rules = SelectionRules(ALL_KINDS, 32)
    removal = select_removal(ARCHITECTURE, random_scores(ARCHITECTURE, seed), rules, 0)
    assert removal.after == smallest_architecture(ARCHITECTURE, rules)
    assert removal.after.layers == (LayerShape(1, 1, 32),) * 3
    assert removal.after.hidden_size == 32
    assert [len(heads) for heads in removal.kept["query_head"]] == [1, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_surviving_heads_belong_to_surviving_groups(seed: int) -> None:
    rules = SelectionRules(("kv_group", "query_head"), 32)
    removal = select_removal(ARCHITECTURE, random_scores(ARCHITECTURE, seed), rules, 0, stop_before=past(4))
    for layer, before, after in zip(range(3), ARCHITECTURE.layers, removal.after.layers, strict=True):
        groups = removal.kept["kv_group"][layer].repeat_interleave(after.queries_per_group)
        assert torch.equal(removal.kept["query_head"][layer] // before.queries_per_group, groups)


def test_selection_rounds_odd_widths_to_a_multiple() -> None:
    architecture = tiny_architecture(layers=(LayerShape(2, 1, 75),))
    rules = SelectionRules(("ffn",), 32)
    removal = select_removal(architecture, {"ffn": [torch.rand(75)]}, rules, 0, stop_before=past(1))
    assert removal.after.layers[0].intermediate_size == 64


@pytest.mark.parametrize("target", [60_000, 80_000, 100_000])
def test_target_is_missed_by_the_last_unit_at_most_and_a_final_one_by_the_smallest(target: int) -> None:
    rules = SelectionRules(("kv_group", "query_head", "ffn"), 8)
    for seed in range(20):
        for final_target in (None, target):
            scores = random_scores(ARCHITECTURE, seed)
            removal = select_removal(ARCHITECTURE, scores, rules, target, final_target=final_target)
            unit = 3 * 64 * 8 if final_target else removal.units[-1].freed  # parameters of 8 channels
            assert removal.after.num_parameters <= target < removal.after.num_parameters + unit


@pytest.mark.parametrize("seed", range(3))
def test_uniform_layout_keeps_layers_equal(seed: int) -> None:
    architecture = tiny_architecture(layers=(LayerShape(6, 2, 96),) * 3)
    rules = SelectionRules(ALL_KINDS, 8, uniform=True)
    removal = select_removal(architecture, random_scores(architecture, seed), rules, 60_000)
    assert removal.after.is_uniform
    assert removal.after.num_parameters <= 60_000
    different = removal.kept["ffn"][0].tolist() != removal.kept["ffn"][1].tolist()
    assert different or len(removal.kept["ffn"][0]) == 96  # each layer loses its own least salient channels


@pytest.mark.parametrize("seed", range(5))
def test_an_explicit_architecture_is_reached_exactly(seed: int) -> None:
    target = tiny_architecture(
        layers=(LayerShape(4, 2, 77), LayerShape(3, 1, 96), LayerShape(2, 2, 13)), hidden_size=51
    )
    check_floor(ARCHITECTURE, target)
    rules = SelectionRules(ALL_KINDS, 1, floor=target)
    removal = select_removal(ARCHITECTURE, random_scores(ARCHITECTURE, seed), rules, target.num_parameters)
    assert removal.after == target


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((LayerShape(6, 2, 96),) * 2, "has 2 layers, the source 3"),
        ((LayerShape(6, 2, 96), LayerShape(6, 3, 96), LayerShape(4, 4, 96)), "layer 1 .* cannot be pruned"),
        ((LayerShape(6, 2, 97), LayerShape(6, 2, 96), LayerShape(4, 4, 96)), "layer 0 .* cannot be pruned"),
    ],
)
def test_an_architecture_out_of_reach_is_refused(layers: tuple[LayerShape, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_floor(ARCHITECTURE, tiny_architecture(layers=layers))


def test_two_removals_compose_to_one() -> None:
    scores = random_scores(ARCHITECTURE)
    rules = SelectionRules(ALL_KINDS, 8)
    whole = select_removal(ARCHITECTURE, scores, rules, 0, stop_before=past(9))
    first = select_removal(ARCHITECTURE, scores, rules, 0, stop_before=past(4))
    remaining = {kind: [v[k] for v, k in zip(scores[kind], first.kept[kind], strict=True)] for kind in KINDS}
    second = select_removal(first.after, remaining, rules, 0, stop_before=past(5))
    composed = compose(first.kept, second.kept)
    assert second.after == whole.after
    for kind, layers in whole.kept.items():
        assert all(torch.equal(a, b) for a, b in zip(layers, composed[kind], strict=True))
