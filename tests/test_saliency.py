from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_architecture, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

from efficientllm.runtime.base.errors import UsageError
from efficientllm.train.compute.trained_model import configure
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.pruning.activation import ActivationScores, GateScores
from efficientllm.train.pruning.criteria import (
    CRITERIA,
    OTHERS,
    TOKEN_FISHER,
    ActivationCriterion,
    Moments,
    criterion_named,
    is_energy,
)
from efficientllm.train.pruning.plan import make_tracker
from efficientllm.train.pruning.running_scores import RandomScores, RunningScores
from efficientllm.train.pruning.saliency import FOLDS
from efficientllm.train.pruning.selection import Removal, all_groups
from efficientllm.train.pruning.surgery import zero_groups

ALL_KINDS = tuple(FOLDS)

TOKENS = torch.randint(0, 400, (4, 12), generator=torch.Generator().manual_seed(5))


def backward(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return float(loss.detach())


def track(name: str, microbatches: int = 1) -> RunningScores:
    architecture = tiny_architecture()
    model = tiny_model(architecture)
    tracker = make_tracker(name, ALL_KINDS, architecture, decay=0.0)
    for tokens in TOKENS.chunk(microbatches):
        model.zero_grad()
        backward(model, tokens)
        tracker.accumulate(model.named_parameters())
    tracker.finish_step()
    return tracker


def test_taylor1_of_an_ffn_channel_is_the_sum_over_its_three_vectors() -> None:
    model = tiny_model(tiny_architecture())
    backward(model, TOKENS)
    mlp, channel = model.model.layers[1].mlp, 17
    expected = (
        (mlp.gate_proj.weight.grad * mlp.gate_proj.weight)[channel].sum()
        + (mlp.up_proj.weight.grad * mlp.up_proj.weight)[channel].sum()
        + (mlp.down_proj.weight.grad * mlp.down_proj.weight)[:, channel].sum()
    ).abs()
    torch.testing.assert_close(track("taylor1").scores["ffn"][1][channel], expected.detach())


def test_taylor1_of_a_key_value_group_sums_its_channels() -> None:
    model = tiny_model(tiny_architecture())
    backward(model, TOKENS)
    attention, group, head_dim, per_group = model.model.layers[0].self_attn, 1, 32, 2
    expected = torch.zeros(())
    for channel in range(head_dim):
        total = torch.zeros(())
        for projection in (attention.k_proj, attention.v_proj):
            total += (projection.weight.grad * projection.weight)[group * head_dim + channel].sum()
        for head in range(group * per_group, (group + 1) * per_group):
            row = head * head_dim + channel
            total += (attention.q_proj.weight.grad * attention.q_proj.weight)[row].sum()
            total += (attention.o_proj.weight.grad * attention.o_proj.weight)[:, row].sum()
        expected += total.abs()
    torch.testing.assert_close(track("taylor1").scores["kv_group"][0][group], expected.detach())


def test_taylor1_of_a_stem_channel_sums_its_pieces() -> None:
    """A layer's attention, a layer's FFN, blocks of the embedding and the final norm count apart."""
    model = tiny_model(tiny_architecture())
    backward(model, TOKENS)
    channel, expected = 11, torch.zeros(())

    def products(name: str) -> torch.Tensor:
        parameter = model.get_parameter(name)
        return (parameter.grad * parameter).detach()

    for layer in range(3):
        for norm, readers, writer in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        ):
            prefix = f"model.layers.{layer}"
            total = products(f"{prefix}.{norm}.weight")[channel]
            total = total + products(f"{prefix}.{writer}.weight")[channel].sum()
            for reader in readers:
                total = total + products(f"{prefix}.{reader}.weight")[:, channel].sum()
            expected = expected + total.abs()
    embedding = products("model.embed_tokens.weight")[:, channel]
    expected = expected + sum(block.sum().abs() for block in embedding.split(3 * 64))
    expected = expected + products("model.norm.weight")[channel].abs()
    torch.testing.assert_close(track("taylor1").scores["stem"][0][channel], expected)


def test_taylor1_predicts_the_loss_change_of_a_small_step() -> None:
    """Shrinking one FFN channel by a small share changes the loss by that share of sum g w."""
    model = tiny_model(tiny_architecture()).double()  # the change is near fp32's rounding of the loss
    before = backward(model, TOKENS)
    scores = track("taylor1").scores["ffn"][1]
    channel, step = int(scores.argmax()), 1e-2
    kept = all_groups(tiny_architecture())
    kept["ffn"][1] = torch.tensor([i for i in range(64) if i != channel])
    shrunk, zeroed = copy.deepcopy(model), copy.deepcopy(model)
    zero_groups(zeroed, Removal(tiny_architecture(), tiny_architecture(), kept, ()))
    with torch.no_grad():
        for small, gone in zip(shrunk.parameters(), zeroed.parameters(), strict=True):
            small.lerp_(gone, step)
        change = abs(float(shrunk(TOKENS, labels=TOKENS).loss) - before)
    assert change == pytest.approx(float(scores[channel]) * step, rel=0.1)


def test_taylor2_uses_each_microbatch_as_a_sample() -> None:
    model = tiny_model(tiny_architecture())
    first, second = torch.zeros(64), torch.zeros(64)
    for tokens in TOKENS.chunk(2):
        model.zero_grad()
        backward(model, tokens)
        for name in ("gate_proj", "up_proj"):
            weight = getattr(model.model.layers[1].mlp, name).weight
            first += (weight.grad * weight).sum(1).detach() / 2
            second += (weight.grad * weight).square().sum(1).detach() / 2
        weight = model.model.layers[1].mlp.down_proj.weight
        first += (weight.grad * weight).sum(0).detach() / 2
        second += (weight.grad * weight).square().sum(0).detach() / 2
    torch.testing.assert_close(track("taylor2", 2).scores["ffn"][1], (first - second / 2).abs())


def test_fisher_is_the_mean_square_of_taylor1_over_microbatches() -> None:
    halves = []
    for tokens in TOKENS.chunk(2):
        model = tiny_model(tiny_architecture())
        backward(model, tokens)
        tracker = make_tracker("taylor1", ("ffn",), tiny_architecture(), 0.0)
        tracker.accumulate(model.named_parameters())
        tracker.finish_step()
        halves.append(tracker.scores["ffn"][2].square())
    torch.testing.assert_close(track("fisher", 2).scores["ffn"][2], (halves[0] + halves[1]) / 2)


def test_magnitude_needs_no_gradient() -> None:
    model = tiny_model(tiny_architecture())
    tracker = make_tracker("magnitude", ("ffn",), tiny_architecture(), 0.0)
    tracker.accumulate(model.named_parameters())
    tracker.finish_step()
    mlp = model.model.layers[0].mlp
    rows = mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1)
    torch.testing.assert_close(tracker.scores["ffn"][0], (rows + mlp.down_proj.weight.square().sum(0)).detach())


def test_average_decays_per_step() -> None:
    architecture = tiny_architecture()
    model = tiny_model(architecture)
    tracker = make_tracker("taylor1", ("ffn",), architecture, decay=0.75)
    seen = []
    for tokens in TOKENS.chunk(2):
        model.zero_grad()
        backward(model, tokens)
        single = make_tracker("taylor1", ("ffn",), architecture, decay=0.0)
        for each in (tracker, single):
            each.accumulate(model.named_parameters())
            each.finish_step()
        seen.append(single.scores["ffn"][0])
    # the newest weighs 1, the one before it 0.75, and the weights sum to 1 from the first step on
    torch.testing.assert_close(tracker.scores["ffn"][0], (0.75 * seen[0] + seen[1]) / 1.75)


def test_unknown_criterion_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=f"--saliency best: unknown; known: {', '.join((*CRITERIA, *OTHERS))}"):
        criterion_named("best")


def watched(name: str, kinds: tuple[str, ...], model: Any) -> RunningScores:
    """Scores of the model's groups after two forward passes in training and one in evaluation."""
    architecture = tiny_architecture()
    tracker = make_tracker(name, kinds, architecture, 0.0)
    tracker.attach(model)
    model.train()
    for tokens in TOKENS.chunk(2):
        model(tokens)
    model.eval()
    model(TOKENS)
    tracker.finish_step()
    tracker.detach()
    return tracker


def test_activation_criteria_equal_a_direct_computation() -> None:
    model = tiny_model(tiny_architecture())
    inputs: dict[str, list[torch.Tensor]] = {"o": [], "down": []}
    layer = model.model.layers[0]
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: inputs["o"].append(a[0].flatten(0, 1)))
    layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs["down"].append(a[0].flatten(0, 1)))
    kinds = ("kv_group", "query_head", "ffn")
    found = {name: watched(name, kinds, model).scores for name in ("flap", "wanda", "minitron")}
    tokens = TOKENS.numel()
    down, o = torch.cat(inputs["down"])[:tokens], torch.cat(inputs["o"])[:tokens]
    weight = layer.mlp.down_proj.weight
    flap = down.var(0, correction=0) * weight.square().sum(0)
    torch.testing.assert_close(found["flap"]["ffn"][0], (flap / flap.mean()).detach())
    wanda = down.square().mean(0).sqrt() * weight.abs().sum(0)
    torch.testing.assert_close(found["wanda"]["ffn"][0], wanda.detach())
    heads = o.abs().mean(0).view(4, 32).sum(1).detach()
    torch.testing.assert_close(found["minitron"]["query_head"][0], heads)
    torch.testing.assert_close(found["minitron"]["kv_group"][0], heads.view(2, 2).sum(1))


def test_token_fisher_is_the_mean_square_of_gate_derivatives() -> None:
    model = tiny_model(tiny_architecture())
    tracker = GateScores(("kv_group", "query_head", "ffn"), tiny_architecture(), decay=0.9)
    tracker.attach(model)
    model.train()
    inputs: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            arguments[0].retain_grad()
            inputs[name] = arguments[0]

        return hook

    layer = model.model.layers[0]
    layer.self_attn.o_proj.register_forward_pre_hook(remember("o"))
    layer.mlp.down_proj.register_forward_pre_hook(remember("down"))
    model(TOKENS, labels=TOKENS).loss.backward()
    tracker.finish_step()
    changes = {name: (x.grad * x).detach().flatten(0, 1) for name, x in inputs.items() if x.grad is not None}
    torch.testing.assert_close(tracker.scores["ffn"][0], changes["down"].square().sum(0))
    heads = changes["o"].view(len(changes["o"]), 4, 32).sum(2).square().sum(0)
    torch.testing.assert_close(tracker.scores["query_head"][0], heads)
    torch.testing.assert_close(tracker.scores["kv_group"][0], heads.view(2, 2).sum(1))


def test_token_fisher_closes_all_gates_of_a_stem_channel_together() -> None:
    model = tiny_model(tiny_architecture())
    tracker = GateScores(("stem",), tiny_architecture(), decay=0.9)
    tracker.attach(model)
    model.train()
    outputs: list[torch.Tensor] = []

    def remember(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    norms = [module for name, module in model.named_modules() if name.endswith(("layernorm", "model.norm"))]
    for norm in norms:
        norm.register_forward_hook(remember)
    model(TOKENS, labels=TOKENS).loss.backward()
    tracker.finish_step()
    assert len(norms) == 2 * 3 + 1
    roots = [(x.grad * x).detach().flatten(0, 1).square().sum(0).sqrt() for x in outputs if x.grad is not None]
    torch.testing.assert_close(tracker.scores["stem"][0], torch.stack(roots).sum(0).square())


def test_token_fisher_forgets_a_step_that_was_skipped() -> None:
    model = tiny_model(tiny_architecture())
    tracker = GateScores(("ffn",), tiny_architecture(), decay=0.9)
    tracker.attach(model)
    model.train()
    (model(TOKENS, labels=TOKENS).loss * 1000).backward()
    tracker.discard_step()
    model(TOKENS, labels=TOKENS).loss.backward()
    tracker.finish_step()
    alone = GateScores(("ffn",), tiny_architecture(), decay=0.9)
    tracker.detach()
    alone.attach(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    alone.finish_step()
    torch.testing.assert_close(tracker.scores["ffn"], alone.scores["ffn"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("checkpoints", [False, True])
def test_token_fisher_is_compiled_with_its_layers(checkpoints: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph break, once a shape, and not again from step to step."""
    architecture = tiny_architecture(layers=(*[LayerShape(4, 2, 96)] * 3, LayerShape(2, 1, 64)))
    compiler, found = CompileCounterWithBackend("aot_eager"), []
    compilation = functools.partialmethod(torch.nn.Module.compile, backend=compiler, fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile", compilation)
    for compiles in (False, True):
        model = tiny_model(architecture).train()
        configure(model, torch.device("cpu"), checkpoints, compiles, stores_gradients_as_computed=False)
        tracker = GateScores(ALL_KINDS, architecture, decay=0.5)
        tracker.attach(model)
        for _ in range(2):
            for tokens in TOKENS.chunk(2):
                model(tokens, labels=tokens, use_cache=False).loss.backward()
            tracker.finish_step()
        found.append(tracker.scores)
    assert compiler.frame_count == (1 if checkpoints else 2)  # with checkpoints, the decoder as a whole
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=1e-5)


def test_activation_criteria_do_not_rank_the_stem() -> None:
    with pytest.raises(UsageError, match="remove stem from --prune"):
        make_tracker("flap", ("ffn", "stem"), tiny_architecture(), 0.9)


def test_a_criterion_of_activations_is_a_plug_in() -> None:
    CRITERIA["mean-square"] = ActivationCriterion(lambda x, _: x.squares / x.count, is_energy=True)
    try:
        assert is_energy("mean-square")
        assert isinstance(make_tracker("mean-square", ("ffn",), tiny_architecture(), 0.0), ActivationScores)
        model = tiny_model(tiny_architecture())
        inputs: list[torch.Tensor] = []
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, 1)))
        found = watched("mean-square", ("ffn",), model).scores["ffn"][0]
        torch.testing.assert_close(found, torch.cat(inputs)[: TOKENS.numel()].square().mean(0).detach())
    finally:
        del CRITERIA["mean-square"]


def test_gates_refuse_a_stem_with_norms_behind_blocks() -> None:
    with pytest.raises(UsageError, match="olmo2 has norms after its blocks; remove stem"):
        GateScores(("stem",), tiny_architecture("olmo2"), decay=0.9)


@pytest.mark.parametrize("name", ["taylor1", "fisher", TOKEN_FISHER, "wanda"])
def test_scores_of_a_layer_without_groups_are_on_the_device_of_the_others(name: str) -> None:
    """A running average on a GPU takes no vector of the CPU. The device here is meta, which needs no GPU."""
    architecture = tiny_architecture(layers=(LayerShape(4, 2, 96), LayerShape(0, 0, 64), LayerShape(2, 1, 0)))
    kinds = ("kv_group", "query_head", "ffn")
    model = tiny_model(architecture).to("meta").train()
    tracker = make_tracker(name, kinds, architecture, decay=0.5)
    tracker.attach(model)
    for _ in range(2):
        if name == "wanda":
            tracker._moments = {  # type: ignore[attr-defined]
                each: Moments(8, *(torch.ones(weight.shape[1], device="meta") for _ in range(3)))
                for each, weight in tracker._weights.items()  # type: ignore[attr-defined]
            }
        elif name == TOKEN_FISHER:
            for gates in tracker.gates.values():  # type: ignore[attr-defined]
                gates.grad = torch.ones_like(gates)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tracker.accumulate(model.named_parameters())
        tracker.finish_step()
    empty = [vector for vectors in tracker.scores.values() for vector in vectors if not len(vector)]
    assert len(empty) == 3
    assert {vector.device.type for vectors in tracker.scores.values() for vector in vectors} == {"meta"}


def test_random_scores_resume_from_a_checkpoint_that_was_loaded_to_a_gpu() -> None:
    """Checkpoints are loaded to the device of the run, where the generator of a CPU takes no state from."""

    class OnGPU:
        """Stands for a tensor on a GPU: it can be copied and do nothing else."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def cpu(self) -> torch.Tensor:
            return self.tensor

        def to(self, device: torch.device) -> torch.Tensor:
            return self.tensor.to(device)

    trackers = [RandomScores(ALL_KINDS, tiny_architecture(), 0.5, seed=3) for _ in range(2)]
    trackers[0].finish_step()
    state = trackers[0].state_dict()
    moved: dict[str, Any] = {
        name: [OnGPU(each.clone()) for each in vectors] for name, vectors in state["scores"].items()
    }
    trackers[1].load_state_dict(state | {"scores": moved, "generator": OnGPU(state["generator"])})
    for tracker in trackers:
        tracker.finish_step()
    for name, vectors in trackers[0].scores.items():
        assert all(map(torch.equal, vectors, trackers[1].scores[name]))


def test_flap_of_inputs_that_are_never_active_is_zero() -> None:
    flap = criterion_named("flap")
    assert isinstance(flap, ActivationCriterion)
    scores = flap.score(Moments.of(torch.zeros(4, 8)), torch.ones(3, 8))
    assert torch.equal(scores, torch.zeros(8))
