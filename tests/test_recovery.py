"""Closed-form recovery: what is fitted, towards what, and within a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_architecture, tiny_model
from training import command, expect_same_run, metrics, run, run_until

from efficientllm.train.compute.distributed import Parallel
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.irregular import architecture_of
from efficientllm.train.pruning import recovery
from efficientllm.train.pruning.recovery import LeastSquares
from efficientllm.train.pruning.rules import SelectionRules
from efficientllm.train.pruning.selection import select_removal
from efficientllm.train.pruning.surgery import remove_groups

WINDOWS = torch.randint(0, 400, (24, 48), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of tiny models see every token of WINDOWS, as they would of a longer text."""
    monkeypatch.setattr(recovery, "ROWS_PER_INPUT", 1000)


ALONE = Parallel("ddp", torch.device("cpu"))


def pruned(source: Any, kinds: tuple[str, ...], keep: float = 0.8) -> tuple[Any, torch.Tensor]:
    """(a model without some of the groups, drawn at random; the stem channels that survive)"""
    architecture = architecture_of(source.config)
    generator = torch.Generator().manual_seed(2)
    scores = {
        "kv_group": [torch.rand(layer.num_key_value_heads, generator=generator) for layer in architecture.layers],
        "query_head": [torch.rand(layer.num_attention_heads, generator=generator) for layer in architecture.layers],
        "ffn": [torch.rand(layer.intermediate_size, generator=generator) for layer in architecture.layers],
        "stem": [torch.rand(architecture.hidden_size, generator=generator)],
    }
    target = round(keep * architecture.num_parameters)
    removal = select_removal(architecture, scores, SelectionRules(kinds, width_multiple=2), target)
    model = copy.deepcopy(source)
    remove_groups(model, removal)
    return model, removal.kept["stem"][0]


def divergence(source: Any, model: Any) -> float:
    """Mean KL(source || model) on other tokens than those of the fit."""
    tokens = torch.randint(0, 400, (8, 48), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        wanted, found = (torch.log_softmax(each(tokens).logits, -1) for each in (source, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("kinds", [("kv_group", "query_head", "ffn"), ("kv_group", "query_head", "ffn", "stem")])
def test_a_fitted_model_is_closer_to_its_source_on_other_text(family: str, kinds: tuple[str, ...]) -> None:
    source = tiny_model(tiny_architecture(family)).eval()
    model, stem = pruned(source, kinds)
    before = divergence(source, model)
    LeastSquares(model, source, stem, damping=0.03, dtype=torch.float32).fit(WINDOWS, ALONE)
    assert divergence(source, model) < 0.95 * before


def test_fit_changes_no_unpruned_model() -> None:
    source = tiny_model(tiny_architecture()).eval()
    model = copy.deepcopy(source)
    LeastSquares(model, source, torch.arange(64), damping=0.1, dtype=torch.float32).fit(WINDOWS, ALONE)
    for one, other in zip(model.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_last_matrix_is_the_ridge_regression_of_its_definition() -> None:
    source = tiny_model(tiny_architecture()).eval()
    model, stem = pruned(source, ("ffn",))
    before = model.model.layers[-1].mlp.down_proj.weight.detach().double().clone()
    LeastSquares(model, source, stem, damping=0.2, dtype=torch.float32).fit(WINDOWS, ALONE)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, arguments, output=None: seen.update({name: (arguments[0] if output is None else output)})

    last = model.model.layers[-1]
    last.mlp.down_proj.register_forward_pre_hook(keep("x"))
    last.post_attention_layernorm.register_forward_pre_hook(keep("stream before"))
    source.model.layers[-1].register_forward_hook(keep("source's stream"))
    with torch.no_grad():
        model(WINDOWS)
        source(WINDOWS)
    x, ours, theirs = (seen[name].flatten(0, 1).double() for name in ("x", "stream before", "source's stream"))
    y = theirs - ours
    energy = y.square().mean(1)
    weighted = x / (energy + energy.median())[:, None]
    damping = 0.2 * (weighted.T @ x).diagonal().mean()
    # at the minimum: X^T D (Y - X W^T) = lambda (W - W_before)^T
    weight = last.mlp.down_proj.weight.double()
    torch.testing.assert_close((weighted.T @ (y - x @ weight.T)).T / damping, weight - before, atol=1e-3, rtol=1e-2)


def test_a_fit_reports_its_layers_and_is_as_good_with_products_in_bf16() -> None:
    source = tiny_model(tiny_architecture()).eval()
    divergences = []
    reports: list[tuple[int, int]] = []
    for dtype in (torch.float32, torch.bfloat16):
        model, stem = pruned(source, ("ffn",))
        fit = LeastSquares(model, source, stem, damping=0.03, dtype=dtype).fit
        fit(WINDOWS, ALONE, report=lambda done, total: reports.append((done, total)))
        divergences.append(divergence(source, model))
    assert reports == 2 * [(1, 3), (2, 3), (3, 3)]
    assert divergences[1] < 1.02 * divergences[0]


def test_a_singular_fit_leaves_finite_weights() -> None:
    """Rounding may leave X^T D X with an eigenvalue below -lambda, where it has no Cholesky factor."""
    source = tiny_model(tiny_architecture()).eval()
    model, stem = pruned(source, ("ffn",))
    LeastSquares(model, source, stem, damping=1e-12, dtype=torch.bfloat16).fit(WINDOWS[:2], ALONE)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_stop_signal_ends_the_fit_between_forward_passes() -> None:
    source = tiny_model(tiny_architecture()).eval()
    model, stem = pruned(source, ("ffn",))
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 4:  # in the first FFN, whose matrix is set aside
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LeastSquares(model, source, stem, damping=0.03, dtype=torch.float32).fit(WINDOWS[:8], ALONE, check)
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)


def stream_error(source: Any, model: Any) -> float:
    """Mean square distance of the last hidden states on the tokens of the fit."""
    with torch.no_grad():
        wanted, found = (each.model(WINDOWS).last_hidden_state for each in (source, model))
    return float((wanted - found).square().mean())


def test_layers_without_heads_or_channels_are_passed_over() -> None:
    layers = (LayerShape(4, 2, 96), LayerShape(0, 0, 64), LayerShape(2, 1, 0))
    source = tiny_model(tiny_architecture(layers=layers)).eval()
    model, stem = pruned(source, ("ffn",), keep=0.95)
    before = stream_error(source, model)
    LeastSquares(model, source, stem, damping=0.03, dtype=torch.float32).fit(WINDOWS, ALONE)
    assert stream_error(source, model) < 0.9 * before


@pytest.mark.slow
def test_a_run_recovers_after_every_removal_and_resumes_bit_identically(
    source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = []
    fit = LeastSquares.fit

    def counting(self: LeastSquares, *arguments: Any) -> None:
        fits.append(self)
        fit(self, *arguments)

    monkeypatch.setattr(LeastSquares, "fit", counting)
    more = ["--recover", "least-squares", "--recover-tokens", "512", "--checkpoint-every", "0", "--no-quality"]
    assert run(command(source_folder, corpus, tmp_path / "straight", *more)) == 0
    removals = sum("removed" in record for record in metrics(tmp_path / "straight"))
    assert len(fits) == removals > 2
    for last in (4, 15):  # between removals, and after the last
        arguments = command(source_folder, corpus, tmp_path / f"stopped-{last}", *more)
        run_until(last, arguments)
        assert run([*arguments, "--resume"]) == 0
        expect_same_run(tmp_path / f"stopped-{last}", tmp_path / "straight")
    assert len(fits) == 3 * removals
