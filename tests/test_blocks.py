"""Whole blocks: how they compete, how they are measured, and what a model without them is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from pruning import LAYERS, random_scores, some_removal
from tiny import tiny_architecture, tiny_model

from efficientllm.train.compute.distributed import Parallel
from efficientllm.train.compute.loss import TrainingLoss
from efficientllm.train.model.architecture import FAMILIES, Architecture, LayerShape
from efficientllm.train.model.groups import BLOCKS, KINDS
from efficientllm.train.model.irregular import architecture_of
from efficientllm.train.pruning.blocks import BlockProbe, BlockScores, absence_of
from efficientllm.train.pruning.rules import SelectionRules, smallest_architecture
from efficientllm.train.pruning.selection import Ranking, Removal, Unit, all_groups, select_removal
from efficientllm.train.pruning.surgery import remove_groups, zero_groups

ARCHITECTURE = tiny_architecture(layers=LAYERS)
WINDOWS = np.random.default_rng(0).integers(3, 400, (6, 17))


def without(architecture: Architecture, name: str, layer: int) -> Removal:
    """The removal of one block."""
    kept = all_groups(architecture)
    for kind in BLOCKS[name].takes:
        for taken in ("kv_group", "query_head") if kind == "kv_group" else (kind,):
            kept[taken][layer] = kept[taken][layer][:0]
    return Removal(architecture, BLOCKS[name].without(architecture, layer), kept, ())


def logits(model: Any, tokens: np.ndarray = WINDOWS) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits.double()


def nats_apart(model: Any, other: Any) -> float:
    """KL(model ‖ other) per predicted token."""
    p, q = (torch.log_softmax(logits(each, WINDOWS[:, :-1]), -1) for each in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def probe(model: Any) -> BlockProbe:
    loss = TrainingLoss(model, torch.float32)
    return BlockProbe(loss, WINDOWS, 4, Parallel("ddp", torch.device("cpu")))


# -- measuring


def test_the_measurement_of_several_blocks_is_reported() -> None:
    reports: list[tuple[int, int]] = []
    loss = TrainingLoss(tiny_model(tiny_architecture(layers=LAYERS)), torch.float32)
    report = lambda done, total: reports.append((done, total))  # noqa: E731
    measuring = BlockProbe(loss, WINDOWS[:8], 4, Parallel("ddp", torch.device("cpu")), report=report)
    measuring.losses([absence_of("ffn_block", 0)])
    assert not reports
    measuring.losses([absence_of("ffn_block", layer) for layer in (0, 1)])
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BLOCKS)
def test_price_of_a_block_is_the_loss_without_it(name: str, family: str) -> None:
    architecture = tiny_architecture(family, LAYERS)
    model = tiny_model(architecture)
    before = logits(model)
    measured = probe(model).losses([absence_of(name, layer) for layer in range(len(LAYERS))])
    assert torch.equal(logits(model), before)  # it is put together again
    for layer, loss in enumerate(measured):
        other = copy.deepcopy(model)
        remove_groups(other, without(architecture, name, layer))
        assert loss == pytest.approx(nats_apart(model, other), rel=1e-4)


def test_blocks_of_several_layers_are_measured_together() -> None:
    model = tiny_model(ARCHITECTURE)
    both = (*absence_of("ffn_block", 1), *absence_of("attention_block", 3))
    other = copy.deepcopy(model)
    remove_groups(other, without(ARCHITECTURE, "ffn_block", 1))
    remove_groups(other, without(architecture_of(other.config), "attention_block", 3))
    assert probe(model).losses([both])[0] == pytest.approx(nats_apart(model, other), rel=1e-4)


def test_a_zeroed_block_is_worth_nothing() -> None:
    model = tiny_model(ARCHITECTURE)
    zero_groups(model, without(ARCHITECTURE, "attention_block", 2))
    assert probe(model).losses([absence_of("attention_block", 2)])[0] == pytest.approx(0, abs=1e-9)


def test_price_excludes_rounding_of_logits() -> None:
    """Logits up to 120 in bf16 are off by up to 0.25, and these blocks cost almost nothing."""
    model = tiny_model(ARCHITECTURE)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 3e-2
    model.lm_head.weight.data *= 20
    rounded = BlockProbe(TrainingLoss(model, torch.bfloat16), WINDOWS, 4, Parallel("ddp", torch.device("cpu")))
    for loss in rounded.losses([absence_of("attention_block", layer) for layer in range(len(LAYERS))]):
        assert 0 <= loss < 1e-4


def test_tokens_that_are_only_read_do_not_count() -> None:
    model = tiny_model(ARCHITECTURE)
    masked = WINDOWS.copy()
    masked[:, 5:] = ~masked[:, 5:]
    parallel = Parallel("ddp", torch.device("cpu"))
    losses = [
        BlockProbe(TrainingLoss(model, torch.float32), windows, 4, parallel).losses([absence_of("layer", 0)])[0]
        for windows in (masked, WINDOWS[:, :5])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# -- the common unit


def block_scores(saliency: str) -> tuple[BlockScores, BlockProbe]:
    """(scores just renewed, the probe)"""
    scores = BlockScores(("attention_block", "ffn_block"), saliency, len(LAYERS), renewals=4, span=100.0)
    found = probe(tiny_model(ARCHITECTURE))
    scores.renew(found, ARCHITECTURE, random_scores(ARCHITECTURE), size=1000.0)
    return scores, found


@pytest.fixture
def measured() -> tuple[BlockScores, BlockProbe]:
    return block_scores("taylor1")


def test_groups_share_the_price_of_their_block(measured: tuple[BlockScores, BlockProbe]) -> None:
    saliency = {kind: vectors for kind, vectors in random_scores(ARCHITECTURE).items() if kind in KINDS}
    nats = measured[0].in_nats(saliency)
    for layer in range(len(LAYERS)):
        for kind, block in (("kv_group", "attention_block"), ("ffn", "ffn_block")):
            assert float(nats[kind][layer].sum()) == pytest.approx(float(nats[block][layer]))
            ratios = nats[kind][layer] / saliency[kind][layer]
            assert torch.allclose(ratios, ratios[:1])  # and keep their order
    assert "layer" not in nats  # it may not go


def test_of_an_energy_the_root_is_shared_out() -> None:
    saliency = {kind: vectors for kind, vectors in random_scores(ARCHITECTURE).items() if kind in ("kv_group", "ffn")}
    nats = block_scores("token-fisher")[0].in_nats(saliency)
    for kind, block in (("kv_group", "attention_block"), ("ffn", "ffn_block")):
        expected = saliency[kind][0].sqrt().double() / saliency[kind][0].sqrt().sum() * float(nats[block][0])
        assert torch.allclose(nats[kind][0], expected)


def test_a_stem_alone_keeps_its_saliency() -> None:
    scores = BlockScores((), "taylor1", len(LAYERS), 1, 1.0)
    scores.renew(probe(tiny_model(ARCHITECTURE)), ARCHITECTURE, {}, size=1.0)
    stem = random_scores(ARCHITECTURE)["stem"]
    assert torch.equal(scores.in_nats({"stem": stem})["stem"][0], stem[0].double())


def test_blocks_are_renewed_as_the_budget_falls(measured: tuple[BlockScores, BlockProbe]) -> None:
    assert measured[0].next_renewal == 975.0  # a quarter of the span
    assert BlockScores(("layer",), "taylor1", 4, 4, 100.0).next_renewal > 1e12


def test_a_block_is_measured_again_once_another_went(measured: tuple[BlockScores, BlockProbe]) -> None:
    scores, found = measured
    first, second = (Unit("ffn_block", ((layer, (0,)),), 1.0, 1.0) for layer in (0, 1))
    group = Unit("ffn", ((0, (0,)),), 1.0, 1.0)
    assert not scores.is_outdated(first)
    assert not scores.is_outdated(second, [group])
    assert scores.is_outdated(second, [first])
    assert not scores.is_outdated(group, [first])
    scores.invalidate([first])
    assert scores.is_outdated(second)
    scores.measure(found, "ffn_block", 1)
    assert not scores.is_outdated(second)


def test_a_layer_is_ranked_by_its_halves_and_measured_before_its_removal() -> None:
    scores = BlockScores(tuple(BLOCKS), "taylor1", len(LAYERS), renewals=4, span=100.0)
    found = probe(tiny_model(ARCHITECTURE))
    scores.renew(found, ARCHITECTURE, random_scores(ARCHITECTURE), size=1000.0)
    nats = scores.in_nats({})
    layer = Unit("layer", ((1, (0,)),), 1.0, 1.0)
    assert float(nats["layer"][1]) == pytest.approx(float(nats["attention_block"][1] + nats["ffn_block"][1]))
    assert scores.is_outdated(layer)
    scores.measure(found, "layer", 1)
    assert not scores.is_outdated(layer)
    assert float(scores.in_nats({})["layer"][1]) == found.losses([absence_of("layer", 1)])[0]


# -- the ranking


def test_blocks_and_groups_compete_in_one_ranking() -> None:
    scores = random_scores(ARCHITECTURE)
    rules = SelectionRules(("kv_group", "ffn"), 8, blocks=("attention_block",))
    saved = ARCHITECTURE.attention_parameters(LAYERS[3])
    cheapest = Ranking(ARCHITECTURE, scores, replace_blocks(rules, ())).peek()
    assert cheapest is not None
    for factor, kind in ((0.99, "attention_block"), (1.01, cheapest.kind)):
        scores["attention_block"] = [torch.tensor([9e9])] * 3 + [torch.tensor([factor * cheapest.score * saved])]
        best = Ranking(ARCHITECTURE, scores, rules).peek()
        assert best is not None
        assert best.kind == kind


def replace_blocks(rules: SelectionRules, blocks: tuple[str, ...]) -> SelectionRules:
    return SelectionRules(rules.kinds, rules.width_multiple, rules.uniform, rules.floor, blocks, rules.measure)


@pytest.mark.parametrize("seed", range(3))
def test_one_attention_and_one_ffn_stay(seed: int) -> None:
    rules = SelectionRules((), blocks=tuple(BLOCKS))
    removal = select_removal(ARCHITECTURE, random_scores(ARCHITECTURE, seed), rules, 0)
    assert sum(bool(layer.num_attention_heads) for layer in removal.after.layers) == 1
    assert sum(bool(layer.intermediate_size) for layer in removal.after.layers) == 1


def test_the_smallest_shape_is_one_step_of_one_layer() -> None:
    rules = SelectionRules(("kv_group", "query_head", "ffn"), 8, blocks=tuple(BLOCKS))
    smallest = smallest_architecture(ARCHITECTURE, rules)
    assert smallest.layers == (*(LayerShape(0, 0, 0),) * 3, LayerShape(1, 1, 8))


def test_selection_stops_before_a_block_that_is_in_doubt() -> None:
    scores = random_scores(ARCHITECTURE)
    rules = SelectionRules(("ffn",), 8, blocks=("attention_block",))
    removal = select_removal(
        ARCHITECTURE, scores, rules, 0, stop_before=lambda unit, taken: unit.kind in BLOCKS and len(taken) > 1
    )
    following = Ranking(ARCHITECTURE, scores, rules)
    for unit in removal.units:
        assert following.peek() == unit
        following.take(unit)
    stopped_at = following.peek()
    assert stopped_at is not None
    assert stopped_at.kind == "attention_block"


def test_only_a_floor_takes_a_block_step_by_step() -> None:
    """An explicit target architecture without some blocks is reached through their groups."""
    floor = tiny_architecture(layers=(LAYERS[0], LayerShape(0, 0, 64), LayerShape(0, 0, 0), LayerShape(6, 2, 0)))
    rules = SelectionRules(("kv_group", "query_head", "ffn"), 1, floor=floor)
    removal = select_removal(ARCHITECTURE, random_scores(ARCHITECTURE), rules, floor.num_parameters)
    assert removal.after == floor
    removal = select_removal(ARCHITECTURE, random_scores(ARCHITECTURE), SelectionRules(rules.kinds, 8), 0)
    assert all(layer.num_attention_heads and layer.intermediate_size for layer in removal.after.layers)


# -- the model without


def test_the_optimizer_forgets_the_parameters_of_a_block() -> None:
    model = tiny_model(tiny_architecture("qwen3", LAYERS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.from_numpy(WINDOWS), labels=torch.from_numpy(WINDOWS)).loss.backward()
    optimizer.step()
    remove_groups(model, some_removal(architecture_of(model.config), tuple(BLOCKS), units=4), optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    assert set(optimizer.state) == set(held)
