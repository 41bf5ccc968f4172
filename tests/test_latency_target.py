"""Pruning for a measured device: prices, budgets and whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import export
from priced import cheap_attention_profile, stepped_profile, tiny_profile, tiny_time
from pruning import LAYERS, past, random_scores
from tiny import tiny_architecture
from training import command, expect_same_run, metrics, run, run_until, without

from efficientllm.runtime.base.errors import OptionError, UsageError
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.latency.profile import DeviceProfile
from efficientllm.runtime.latency.shape import Workload
from efficientllm.runtime.latency.table import Surcharge
from efficientllm.train.cli import build_parser, configuration
from efficientllm.train.config.pruning import LatencyTarget, PruneConfig
from efficientllm.train.loop.request import check_request
from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.model.file_types import gguf_bytes
from efficientllm.train.model.groups import BLOCKS, KINDS, counts
from efficientllm.train.pruning.blocks import BlockScores
from efficientllm.train.pruning.budget import Budget, check_budget
from efficientllm.train.pruning.measures import PARAMETERS, Measure, bytes_of_file, decoder_shape
from efficientllm.train.pruning.rules import SelectionRules, smallest_architecture
from efficientllm.train.pruning.selection import Ranking, select_removal

SPACE = ("--prune", "attention,ffn,blocks")
ARCHITECTURE = tiny_architecture(layers=LAYERS)


# -- prices


@pytest.mark.parametrize("measure", [PARAMETERS, bytes_of_file("q4_0", 0), tiny_time().measure], ids=lambda m: m.unit)
def test_each_unit_frees_the_difference_of_the_shapes(measure: Measure) -> None:
    rules = SelectionRules(tuple(KINDS), 32, blocks=tuple(BLOCKS), measure=measure)
    removal = select_removal(ARCHITECTURE, random_scores(ARCHITECTURE), rules, 0, stop_before=past(6))
    total = measure.of(ARCHITECTURE) - measure.of(removal.after)
    assert sum(unit.freed for unit in removal.units) == pytest.approx(total)


def test_deep_contexts_make_heads_go_first() -> None:
    """The same saliency, two workloads: a head frees little of an empty context, much of a long one."""
    scores = {"kv_group": [torch.ones(layer.num_key_value_heads) for layer in LAYERS]}
    scores["ffn"] = [torch.full((layer.intermediate_size,), 0.003) for layer in LAYERS]
    first = []
    for depth in (0, 2048):
        measure = tiny_time(workload=Workload.at_depth(depth)).measure
        unit = Ranking(ARCHITECTURE, scores, SelectionRules(("kv_group", "ffn"), 8, measure=measure)).peek()
        assert unit is not None
        first.append(unit.kind)
    assert first == ["ffn", "kv_group"]


def test_channels_go_by_the_step_of_the_kernel() -> None:
    """A width of 128 in steps of 64 takes 2 ms: 8 channels free nothing, 64 free one step, and so 64 go at once."""
    architecture = tiny_architecture(layers=(LayerShape(4, 2, 128),) * 2)
    scores = {"ffn": [torch.arange(128.0), torch.arange(128.0) + 1]}
    rules = SelectionRules(("ffn",), 8, measure=tiny_time(stepped_profile()).measure)
    unit = Ranking(architecture, scores, rules).peek()
    assert unit is not None
    assert unit.parts == ((0, tuple(range(64))),)
    assert unit.freed == pytest.approx(1.0)


def test_selection_keeps_groups_that_free_nothing() -> None:
    architecture = tiny_architecture(layers=(LayerShape(4, 2, 64),))
    rules = SelectionRules(("ffn",), 8, measure=tiny_time(stepped_profile(step=256)).measure)
    assert Ranking(architecture, {"ffn": [torch.ones(64)]}, rules).peek() is None


def test_price_follows_the_remaining_shape() -> None:
    """Query heads of a layer with one group left free less than they did with two."""
    measure = tiny_time().measure
    rules = SelectionRules(("kv_group", "query_head"), measure=measure)
    ranking = Ranking(ARCHITECTURE, random_scores(ARCHITECTURE), rules)
    before = ranking.peek("query_head")
    while before is not None and (taken := ranking.peek("kv_group")) is not None:
        ranking.take(taken)
        for name in rules.kinds:
            fresh = Ranking(ranking.architecture, random_scores(ranking.architecture), rules)
            for layer in range(len(LAYERS)):
                old, new = ranking._candidate(name, layer), fresh._candidate(name, layer)
                assert (old is None) == (new is None)
                assert old is None or new is None or old.freed == pytest.approx(new.freed)


def test_bytes_equal_those_of_the_padded_file() -> None:
    """Two channels of 96 free no byte of a file in blocks of 32; a run to the next block does."""
    architecture = tiny_architecture(layers=(LayerShape(4, 2, 96),))
    rules = SelectionRules(("ffn",), 2, measure=bytes_of_file("q8_0", 0))
    unit = Ranking(architecture, {"ffn": [torch.ones(96)]}, rules).peek()
    assert unit is not None
    assert len(unit.parts[0][1]) == 32
    smaller = tiny_architecture(layers=(LayerShape(4, 2, 64),))
    assert unit.freed == gguf_bytes(architecture, "q8_0", 0) - gguf_bytes(smaller, "q8_0", 0)


def test_a_head_of_another_type_weighs_more_in_bytes() -> None:
    """The tied embedding of a 4-bit file is q8_0: a stem channel frees more of it than its parameters say."""
    rules = [SelectionRules(("stem", "ffn"), 32, measure=each) for each in (PARAMETERS, bytes_of_file("q4_0", 0))]
    architecture = replace(ARCHITECTURE, hidden_size=96)  # the file pads a stem of 32 channels to 64
    freed = []
    for each in rules:
        ranking = Ranking(architecture, random_scores(architecture), each)
        stem, ffn = ranking.peek("stem"), ranking.peek("ffn")
        assert stem is not None
        assert ffn is not None
        freed.append(stem.freed / ffn.freed)
    assert freed[1] > 1.1 * freed[0]


def test_price_is_of_the_stored_shape() -> None:
    layers = (LayerShape(4, 2, 96), LayerShape(0, 0, 0), LayerShape(2, 1, 0), LayerShape(0, 0, 64))
    shape = decoder_shape(tiny_architecture(layers=layers))
    assert [(layer.num_attention_heads, layer.intermediate_size) for layer in shape.layers] == [(4, 96), (2, 64)]


# -- settings


@pytest.mark.parametrize(("text", "ms"), [("0.6x", 12.0), ("8ms", 8.0), (" 1x ", 20.0), (".5 ms", 0.5)])
def test_a_target_is_a_share_or_milliseconds(text: str, ms: float) -> None:
    assert LatencyTarget.parse(text).of(20.0) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["8", "0x", "1.5x", "8s", "x", "-8ms", "nanms"])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"--target-latency .*: .*give a share"):
        PruneConfig(target_latency=text, device_profile="a.json", at_depth=512)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_latency": "0.6x", "at_depth": 1}, "needs --device-profile FILE"),
        ({"target_latency": "0.6x", "device_profile": "a"}, "needs either --workload .* or --at-depth"),
        ({"target_latency": "1ms", "device_profile": "a", "at_depth": 1, "workload": "depth=1"}, "needs either"),
        ({"device_profile": "a"}, "--device-profile a: applies only to --target-latency"),
        ({"ranking_profile": "a"}, "--ranking-profile a: applies only to --target-latency"),
        (
            {
                "target_latency": "1ms",
                "device_profile": "a",
                "at_depth": 1,
                "ranking_profile": "b",
                "rank_by": "parameters",
            },
            "ranks by milliseconds; omit --rank-by",
        ),
        ({"target_latency": "0.6x", "target_params": 5, "device_profile": "a", "at_depth": 1}, "are both given"),
        ({"target_latency": "0.6x", "device_profile": "a", "workload": "tokens=3"}, "cannot read 'tokens=3'"),
        ({"prune": ("blocks",), "layout": "uniform"}, "needs layers that may differ"),
        ({"prune": ("ffn", "blocks"), "score_scale": "saliency"}, "blocks need scores in one unit"),
        ({"prune": ("ffn", "layers"), "target_architecture": "a.json"}, "determines the blocks"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises((UsageError, ValueError), match=message):
        PruneConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"target_params": 5}, False),
        ({"target_params": 5, "prune": ("ffn", "blocks")}, True),
        ({"target_params": 5, "score_scale": "blocks"}, True),
        ({"target_latency": "0.6x", "device_profile": "a", "at_depth": 1}, True),
        ({"target_latency": "0.6x", "device_profile": "a", "at_depth": 1, "rank_by": "parameters"}, False),
        ({"target_latency": "0.6x", "device_profile": "a", "at_depth": 1, "score_scale": "saliency"}, False),
    ],
)
def test_blocks_are_measured_where_their_scale_matters(settings: dict[str, object], measured: bool) -> None:
    assert PruneConfig(**settings).measures_blocks == measured  # type: ignore[arg-type]


# -- runs


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "device.json"
    tiny_profile().save(path)
    return path


def latency_command(source: Path, corpus: Path, output: Path, device: Path, *more: str) -> list[str]:
    """A run to 0.7 of the source's time at depth 512."""
    space = without(without(command(source, corpus, output), "--target-ratio"), "--prune")
    target = ["--target-latency", "0.7x", "--device-profile", str(device), "--at-depth", "512"]
    return [*space, *target, "--block-tokens", "256", *more]


def final(folder: Path) -> Architecture:
    return Architecture.from_dict(json.loads((folder / "architecture.json").read_text())["final"])


@pytest.mark.slow
@pytest.mark.parametrize("space", ["attention,ffn", "attention,ffn,stem,blocks", "blocks", "layers"])
def test_a_run_reaches_its_milliseconds(
    space: str, device: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert run(latency_command(source_folder, corpus, output, device, "--prune", space)) == 0
    measure, source = tiny_time().measure, Architecture.from_folder(source_folder)
    ms = measure.of(final(output))
    assert ms <= 0.7 * measure.of(source)
    steps = [record for record in metrics(output) if "loss" in record]
    assert steps[-1]["ms"] == pytest.approx(ms, abs=1e-4)
    assert steps[0]["ms"] == pytest.approx(measure.of(source), abs=1e-4)
    card = (output / "model" / "README.md").read_text()
    assert f"took the source {measure.of(source):.2f} ms and takes this model {ms:.2f} ms" in card
    assert "its median error on irregular models is 2.0%" in card
    stored = Architecture.from_folder(output / "model")
    assert stored.num_parameters == final(output).num_parameters
    assert all(layer.num_attention_heads or layer.intermediate_size for layer in stored.layers)
    if space == "attention,ffn":
        assert export(output, "gguf", tmp_path / "gguf", "--quantize", "q8_0", "--no-verify") == 0
        (note,) = [note for note in Manifest.read(tmp_path / "gguf").notes if "milliseconds" in note]
        assert note.startswith("pruned for the milliseconds of llama.cpp q4_0; those of llama.cpp q8_0 are others")
    if space == "layers":
        assert stored.layers == (LayerShape(4, 2, 128),) * len(stored.layers)
        assert len(stored.layers) < len(source.layers)


def test_groups_compete_for_milliseconds_of_another_device(
    device: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """Where attention is cheap channels are what pays; the time is that of the target's device."""
    other = tmp_path / "other.json"
    cheap_attention_profile().save(other)
    channels = {}
    for name, more in (("own", ()), ("other", ("--ranking-profile", str(other)))):
        arguments = latency_command(source_folder, corpus, tmp_path / name, device, "--prune", "attention,ffn", *more)
        assert run(arguments) == 0
        assert tiny_time().measure.of(final(tmp_path / name)) <= 0.7 * tiny_time().measure.of(
            Architecture.from_folder(source_folder)
        )
        channels[name] = sum(layer.intermediate_size for layer in final(tmp_path / name).layers)
    assert channels["other"] < channels["own"]


def odd_profile() -> DeviceProfile:
    """A device whose kernels take two blocks at a time."""
    profile = tiny_profile()
    conditions = profile.table.num_conditions
    odd = Surcharge(np.full(conditions, 1e9), np.zeros(conditions), np.full(conditions, 0.5))
    return replace(profile, table=replace(profile.table, surcharge=odd), _prices={})


@pytest.mark.parametrize("kinds", [("kv_group", "ffn", "stem"), ("kv_group", "ffn"), ("ffn",)])
def test_the_least_is_not_always_the_smallest(kinds: tuple[str, ...]) -> None:
    """What the ranking reaches is a target; what it does not reach is refused."""
    source, measure = tiny_architecture(), tiny_time(odd_profile()).measure
    rules = SelectionRules(kinds, 32, measure=measure)
    scores = {kind: [torch.ones(count) for count in counts(kind, source)] for kind in KINDS}
    reached = measure.of(select_removal(source, scores, rules, 0.0).after)
    assert reached < measure.of(source)
    check_budget(Budget(1.0001 * reached, measure), source, rules)
    with pytest.raises(UsageError, match="is too small"):
        check_budget(Budget(0.5 * reached, measure), source, rules)


def test_where_another_device_gains_nothing_more_the_own_one_decides() -> None:
    source = tiny_architecture()
    own, other = tiny_time().measure, tiny_time(stepped_profile(step=256)).measure
    rules = SelectionRules(("ffn",), 32, measure=own, cost=other)
    scores = {kind: [torch.ones(count) for count in counts(kind, source)] for kind in KINDS}
    target = own.of(smallest_architecture(source, rules))
    removal = select_removal(source, scores, rules, target)
    assert own.of(removal.after) <= target


@pytest.mark.slow
def test_a_stopped_run_for_a_device_resumes_bit_identically(
    device: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = [
        latency_command(source_folder, corpus, tmp_path / name, device, *SPACE, "--weight-update", "obs")
        for name in ("straight", "stopped")
    ]
    assert run(arguments[0]) == 0
    run_until(7, arguments[1])
    assert run([*arguments[1], "--resume"]) == 0
    expect_same_run(tmp_path / "stopped", tmp_path / "straight")


def test_blocks_go_by_an_explicit_architecture(source_folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Reached step by step, and recovered from by least squares on the way."""
    shape = tiny_architecture(layers=(LayerShape(4, 2, 128), LayerShape(0, 0, 0), LayerShape(2, 1, 0)))
    (tmp_path / "shape.json").write_text(json.dumps(shape.to_dict()))
    arguments = without(command(source_folder, corpus, tmp_path / "run"), "--target-ratio")
    more = ["--target-architecture", str(tmp_path / "shape.json"), "--recover", "least-squares"]
    assert run([*arguments, *more, "--recover-tokens", "512", "--prune-every", "5"]) == 0
    assert final(tmp_path / "run") == shape
    assert Architecture.from_folder(tmp_path / "run" / "model").layers == (shape.layers[0], shape.layers[2])


def test_fit_covers_models_without_blocks(
    device: Path, source_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once by token-fisher, as the quickstart does it; blocks are measured anew on the way nevertheless."""
    renewed_at: list[float] = []
    renew = BlockScores.renew

    def noting(self: BlockScores, probe: object, architecture: object, scores: object, size: float) -> None:
        renewed_at.append(size)
        renew(self, probe, architecture, scores, size)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockScores, "renew", noting)
    at_once = ["--prune-start", "0.2", "--prune-end", "0.2", "--saliency", "token-fisher"]
    more = [*SPACE, *at_once, "--block-renewals", "3", "--recover", "least-squares", "--recover-tokens", "512"]
    output = tmp_path / "run"
    assert run(latency_command(source_folder, corpus, output, device, *more, "--target-latency", "0.5x")) == 0
    removed = [record["removed"] for record in metrics(output) if "removed" in record]
    assert len(removed) == 1
    assert 2 <= len(renewed_at) <= 3
    assert renewed_at == sorted(set(renewed_at), reverse=True)
    assert any(kind in BLOCKS for kind, *_ in removed[0])
    assert tiny_time().measure.of(final(output)) <= 0.7 * tiny_time().measure.of(
        Architecture.from_folder(source_folder)
    )


def test_an_impossible_time_is_refused(
    device: Path, source_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = latency_command(source_folder, corpus, tmp_path / "run", device)
    arguments[arguments.index("0.7x")] = "0.001ms"
    assert run(arguments) == 2
    assert "the target of 0.001 ms is too small: one group per layer already takes" in capsys.readouterr().err
    arguments = latency_command(source_folder, corpus, tmp_path / "run", device, "--qat", "q8_0")
    assert run(arguments) == 2
    assert "the device profile was measured with quantization q4_0, not q8_0" in capsys.readouterr().err


def test_a_missing_profile_is_refused_before_the_model_is_loaded(
    source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = latency_command(source_folder, corpus, tmp_path / "run", tmp_path / "none.json")
    values = build_parser().parse(arguments)
    values.pop("print_config")
    with pytest.raises(UsageError, match=r"none\.json does not exist"):
        check_request(configuration(values))
