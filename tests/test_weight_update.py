from __future__ import annotations

import copy

import pytest
import torch
from pruning import LAYERS, some_removal
from tiny import tiny_architecture, tiny_model

from efficientllm.train.pruning.recovery import InputGrams, compensation
from efficientllm.train.pruning.surgery import zero_groups

TOKENS = torch.randint(0, 400, (4, 40), generator=torch.Generator().manual_seed(7))
AXES = {"query", "ffn", "hidden"}


def observed(model: torch.nn.Module, **settings: int) -> InputGrams:
    grams = InputGrams(model, AXES, 0.9, 1e-6, settings.get("max_width", 0), settings.get("rows", 0))
    model.train()
    with torch.no_grad():
        model(TOKENS)
    model.eval()
    return grams


def test_compensation_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 12) @ torch.randn(12, 12)
    weight = torch.randn(5, 12)
    kept, gone = torch.tensor([0, 2, 3, 5, 7, 8, 11]), torch.tensor([1, 4, 6, 9, 10])
    matrix = compensation(x.T @ x / len(x), kept, damping=1e-9)
    ours = weight[:, kept].double() + weight[:, gone].double() @ matrix
    theirs = torch.linalg.lstsq(x[:, kept].double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_grams_equal_those_of_the_inputs() -> None:
    model = tiny_model(tiny_architecture())
    inputs = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    grams = observed(model)
    x = inputs[0].flatten(0, 1)
    torch.testing.assert_close(grams.grams["model.layers.1.mlp.down_proj"], x.T @ x / len(x))
    shapes = {name.split(".", 3)[-1]: len(gram) for name, gram in grams.grams.items() if ".0." in name}
    assert shapes == {"self_attn.q_proj": 64, "self_attn.o_proj": 128, "mlp.gate_proj": 64, "mlp.down_proj": 96}
    assert set(observed(tiny_model(tiny_architecture()), max_width=96).grams).isdisjoint(
        {"model.layers.0.self_attn.o_proj"}
    )


@pytest.mark.parametrize("kind", ["ffn", "kv_group", "query_head", "stem"])
def test_the_update_brings_the_outputs_closer(kind: str) -> None:
    """Outputs of the whole model on the observed tokens: nearer to the unpruned ones than without the update."""
    architecture = tiny_architecture(layers=LAYERS)
    original = tiny_model(architecture)
    removal = some_removal(architecture, (kind,), units=4)
    plain, updated = copy.deepcopy(original), copy.deepcopy(original)
    grams = observed(updated)
    grams.update_weights(updated, removal)
    zero_groups(plain, removal)
    zero_groups(updated, removal)
    with torch.inference_mode():
        reference = original(TOKENS).logits
        distances = [(model(TOKENS).logits - reference).square().mean() for model in (plain, updated)]
    assert distances[1] < 0.9 * distances[0]


def test_only_affected_layers_change() -> None:
    architecture = tiny_architecture()
    model = tiny_model(architecture)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    removal = some_removal(architecture, ("ffn",), units=1)
    observed(model).update_weights(model, removal)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"model.layers.{removal.units[0].parts[0][0]}.mlp.down_proj.weight"}
