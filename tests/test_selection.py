from __future__ import annotations

import pytest
import torch
from test_surgery import random_scores
from tiny import tiny_architecture

from efficientllm.runtime.errors import UsageError
from efficientllm.train.architecture import LayerShape
from efficientllm.train.saliency import GROUP_KINDS
from efficientllm.train.selection import SelectionRules, check_target, select_removal, smallest_architecture

LAYERS = (LayerShape(6, 2, 96), LayerShape(6, 2, 96), LayerShape(4, 4, 96))
ARCHITECTURE = tiny_architecture(layers=LAYERS)


def test_takes_the_least_salient_channels_first() -> None:
    scores = random_scores(ARCHITECTURE)
    scores["ffn"][1][:] += 10
    scores["ffn"][1][[3, 50, 51, 90]] = 0.0
    removal = select_removal(ARCHITECTURE, {"ffn": scores["ffn"]}, SelectionRules(("ffn",), 4), 0, max_units=1)
    assert removal.units[0].layer == 1
    assert removal.units[0].indices == (3, 50, 51, 90)
    assert removal.after.layers[1].intermediate_size == 92


def test_ranks_by_saliency_per_parameter_across_types() -> None:
    scores = {"kv_group": [torch.ones(2), torch.ones(2), torch.ones(4)], "ffn": [torch.ones(96)] * 3}
    cheap = 3 * 64 * 8  # parameters of 8 channels
    group = 64 * 32 * 8  # 1 key, 1 value, 3 query and 3 output heads
    for layer in range(3):
        scores["kv_group"][layer] *= 100 * group
    scores["kv_group"][0][1] = 8 * group / cheap * 0.99
    rules = SelectionRules(("kv_group", "ffn"), 8)
    first = select_removal(ARCHITECTURE, scores, rules, 0, max_units=1).units[0]
    assert (first.kind, first.layer) == ("kv_group", 0)
    scores["kv_group"][0] *= 2
    assert select_removal(ARCHITECTURE, scores, rules, 0, max_units=1).units[0].kind == "ffn"


@pytest.mark.parametrize("seed", range(5))
def test_down_to_the_floor_and_no_further(seed: int) -> None:
    rules = SelectionRules(GROUP_KINDS, 32)
    removal = select_removal(ARCHITECTURE, random_scores(ARCHITECTURE, seed), rules, 0)
    assert removal.after == smallest_architecture(ARCHITECTURE, rules)
    assert removal.after.layers == (LayerShape(1, 1, 32),) * 3
    assert removal.after.hidden_size == 32
    assert [len(heads) for heads in removal.kept["query_head"]] == [1, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_surviving_heads_belong_to_surviving_groups(seed: int) -> None:
    rules = SelectionRules(("kv_group", "query_head"), 32)
    removal = select_removal(ARCHITECTURE, random_scores(ARCHITECTURE, seed), rules, 0, max_units=4)
    for layer, before, after in zip(range(3), ARCHITECTURE.layers, removal.after.layers, strict=True):
        groups = removal.kept["kv_group"][layer].repeat_interleave(after.queries_per_group)
        assert torch.equal(removal.kept["query_head"][layer] // before.queries_per_group, groups)


def test_a_width_that_is_no_multiple_becomes_one() -> None:
    architecture = tiny_architecture(layers=(LayerShape(2, 1, 75),))
    rules = SelectionRules(("ffn",), 32)
    removal = select_removal(architecture, {"ffn": [torch.rand(75)]}, rules, 0, max_units=1)
    assert removal.after.layers[0].intermediate_size == 64


@pytest.mark.parametrize("target", [60_000, 80_000, 100_000])
def test_stops_within_one_unit_of_the_target(target: int) -> None:
    rules = SelectionRules(("kv_group", "query_head", "ffn"), 8)
    removal = select_removal(ARCHITECTURE, random_scores(ARCHITECTURE), rules, target)
    last = removal.units[-1].num_parameters
    assert removal.after.num_parameters <= target < removal.after.num_parameters + last


def test_targets_out_of_reach_are_refused() -> None:
    rules = SelectionRules(("ffn",), 32)
    with pytest.raises(UsageError, match="is larger than the source's"):
        check_target(ARCHITECTURE, rules, ARCHITECTURE.num_parameters + 1)
    with pytest.raises(UsageError, match="too small: one group per layer already takes"):
        check_target(ARCHITECTURE, rules, 1000)
