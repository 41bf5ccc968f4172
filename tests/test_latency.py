"""Prices of decoders: the table of a device, its file, and workloads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from latency import DEPTHS, MEASURED_ON, PROMPTS, made_up_profile, true_ms

from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.latency.profile import DeviceProfile
from efficientllm.runtime.latency.shape import DecoderShape, LayerShape, Workload
from efficientllm.runtime.latency.table import Grid, parabola_weights, weights_between

IRREGULAR = DecoderShape(
    448, 64, 1024, (LayerShape(9, 3, 1536), LayerShape(2, 2, 672), LayerShape(0, 0, 320), LayerShape(4, 2, 0))
)


def test_a_table_prices_irregular_shapes_between_its_nodes() -> None:
    profile = made_up_profile()
    for depth in (0, 100, 512, 1000, 4000):  # nodes, between them, and beyond the last
        assert profile.decode_ms(IRREGULAR, depth) == pytest.approx(true_ms(IRREGULAR, depth))
    outside = dataclasses.replace(IRREGULAR, hidden_size=640, layers=(LayerShape(12, 4, 2048),))
    assert profile.decode_ms(outside, 512) == pytest.approx(true_ms(outside, 512))


def test_a_layer_that_lost_both_parts_costs_nothing() -> None:
    profile = made_up_profile()
    longer = dataclasses.replace(IRREGULAR, layers=(*IRREGULAR.layers, LayerShape(0, 0, 0)))
    for workload in (Workload.at_depth(512), Workload(prompt_tokens=64, answer_tokens=3)):
        assert profile.workload_ms(longer, workload) == profile.workload_ms(IRREGULAR, workload)


def test_an_absent_part_of_a_layer_may_still_cost_something() -> None:
    """deci cannot lack an FFN: exporters write 64 zero channels."""
    profile = made_up_profile()
    parts = profile.table.parts | {"no_ffn": Grid(((256, 576),), np.full((2, 6), 0.5))}
    dearer = dataclasses.replace(profile, table=dataclasses.replace(profile.table, parts=parts), _prices={})
    assert dearer.decode_ms(IRREGULAR, 0) == pytest.approx(profile.decode_ms(IRREGULAR, 0) + 0.5)


def test_a_workload_is_its_prompt_and_every_token_of_its_answer() -> None:
    profile = made_up_profile()
    tokens = sum(profile.decode_ms(IRREGULAR, depth) for depth in range(500, 530))
    assert profile.workload_ms(IRREGULAR, Workload(answer_tokens=30, depth=500)) == pytest.approx(tokens)
    whole = profile.workload_ms(IRREGULAR, Workload(prompt_tokens=500, answer_tokens=30))
    assert whole == pytest.approx(tokens + profile.prefill_ms(IRREGULAR, 500))
    measured = np.array([profile.prefill_ms(IRREGULAR, length) for length in PROMPTS])
    assert profile.prefill_ms(IRREGULAR, 320) == pytest.approx(parabola_weights(PROMPTS, 320) @ measured)


def test_the_breakdown_adds_up_to_the_whole() -> None:
    parts = made_up_profile().breakdown(IRREGULAR, Workload.at_depth(512))
    assert parts.total_ms == pytest.approx(true_ms(IRREGULAR, 512))
    assert [ms > 0 for ms in parts.attention_ms] == [True, True, False, True]
    assert [ms > 0 for ms in parts.ffn_ms] == [True, True, True, False]
    assert parts.head_ms == pytest.approx(1e-7 * 448 * 1024)


def test_nothing_costs_less_than_nothing() -> None:
    falling = Grid(((0, 10),), np.array([[1.0], [0.5]]))
    assert falling.at(30)[0] < 0  # a line drawn on from the last two nodes
    profile = made_up_profile()
    parts = profile.table.parts | {"no_ffn": Grid(((256, 576),), np.full((2, 6), -0.5))}
    table = dataclasses.replace(profile.table, parts=parts)
    assert table.figures("no_ffn", 300).min() == 0


def test_weights_between_nodes_hold_the_coordinate() -> None:
    nodes = (0, 512, 2048)
    for value in (0, 1, 511, 512, 1000, 2048, 3000):
        weights = weights_between(nodes, value)
        assert weights.sum() == pytest.approx(1)
        assert weights @ np.array(nodes) == pytest.approx(value)
    assert weights_between((7,), 100).tolist() == [1.0]


def test_a_prompt_is_interpolated_by_a_parabola() -> None:
    def ms(tokens: float) -> float:
        return 3 + 0.9 * tokens + 0.003 * tokens**2

    for nodes in ((1, 32, 512), (1, 32, 128, 512, 2048)):
        for value in (1, 16, 32, 100, 512, 3000):
            assert parabola_weights(nodes, value) @ np.array([ms(node) for node in nodes]) == pytest.approx(ms(value))
    assert parabola_weights((10, 20), 15).tolist() == [0.5, 0.5]
    assert parabola_weights((7,), 100).tolist() == [1.0]


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile, file = made_up_profile(), tmp_path / "profile.json"
    profile.save(file)
    again = DeviceProfile.load(file)
    assert again.measured_on == MEASURED_ON
    assert again.errors == profile.errors
    assert again.held_out == profile.held_out
    assert again.table.depths == DEPTHS
    for depth in DEPTHS:
        assert again.decode_ms(IRREGULAR, depth) == pytest.approx(profile.decode_ms(IRREGULAR, depth), rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_another_engine_type_or_thread_count_is_refused() -> None:
    profile = made_up_profile()
    profile.check(engine="llama.cpp", quantization="q4_0", threads=1)
    profile.check()
    with pytest.raises(UsageError, match=r"measured with engine llama\.cpp, not onnxruntime"):
        profile.check(engine="onnxruntime")
    with pytest.raises(UsageError, match="measured with quantization q4_0, not q8_0"):
        profile.check(engine="llama.cpp", quantization="q8_0")
    with pytest.raises(UsageError, match="measured with threads 1, not 2; measure that one"):
        profile.check(threads=2)
    with pytest.raises(UsageError, match="heads of 64 channels, the model has 128"):
        profile.decode_ms(dataclasses.replace(IRREGULAR, head_dim=128), 0)


def test_refusal_names_the_file_without_a_profile(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    with pytest.raises(UsageError, match=r"profile.json does not exist; measure one"):
        DeviceProfile.load(file)
    file.write_text("{")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        DeviceProfile.load(file)
    made_up_profile().save(file)
    whole = json.loads(file.read_text())
    for change in ({"kind": "latency_model"}, {"schema_version": 99}):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(UsageError, match="is not a device profile of schema 1; measure it again"):
            DeviceProfile.load(file)
    del whole["table"]["parts"]["ffn"]["ms"][0]
    for change in ({"table": whole["table"]}, {"measured_on": {}}, {"errors": 3}, {"held_out": []}):
        file.write_text(json.dumps(json.loads(json.dumps(whole)) | change))
        with pytest.raises(UsageError, match="is damaged"):
            DeviceProfile.load(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt=256,answer=128", Workload(256, 128)),
        (" answer = 4 , prompt=2", Workload(2, 4)),
        ("prompt=9", Workload(9)),
        ("depth=512", Workload.at_depth(512)),
        ("depth=0", Workload.at_depth(0)),
        ("depth=10,answer=5", Workload(0, 5, 10)),
    ],
)
def test_workloads_are_read_as_they_are_typed(text: str, expected: Workload) -> None:
    assert Workload.parse(text) == expected
    assert Workload.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "512", "prompt", "prompt=-1", "prompt=1,prompt=2", "tokens=3", "answer=0", "prompt=5,depth=5", "depth=x"],
)
def test_other_workloads_give_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="give prompt=256,answer=128"):
        Workload.parse(text)


@pytest.mark.parametrize("widths", [(1, 0, 1), (0, 1, 1), (3, 2, 1), (-1, 1, 1), (1, 1, -1)])
def test_layers_that_cannot_be_are_refused(widths: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        DecoderShape(64, 64, 64, (LayerShape(*widths),))
