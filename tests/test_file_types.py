"""What every tensor of a GGUF becomes, and what the file weighs, against llama.cpp's own quantiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared import made_once
from tiny import tiny_architecture, tiny_model
from transformers import PreTrainedTokenizerFast

from efficientllm.export.checkpoint import Checkpoint
from efficientllm.export.gguf.layout import plan_layout
from efficientllm.export.gguf.quantize import quantize_gguf
from efficientllm.export.gguf.tensor_data import num_bytes
from efficientllm.export.gguf.type_choice import FileTypes, tensor_type
from efficientllm.export.gguf.writer import gguf_name, write_gguf
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.base.gguf_header import read_header
from efficientllm.train.config.pruning import PruneConfig
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.file_types import BODY, TENSOR_INFO_BYTES, file_types, gguf_bytes, row_multiple
from efficientllm.train.model.irregular import save_checkpoint
from efficientllm.train.pruning.budget import Budget, check_budget, check_smallest_size
from efficientllm.train.pruning.measures import bytes_of_file
from efficientllm.train.pruning.rules import SelectionRules, smallest_architecture
from efficientllm.train.pruning.selection import select_removal

NUMBERS = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k"} | {
    **{12: "q4_k", 13: "q5_k", 14: "q6_k", 20: "iq4_nl", 30: "bf16"}
}
LAYERS = (*(LayerShape(4, 2, 256),) * 8, LayerShape(2, 2, 96), LayerShape(4, 1, 512))
"""Rows of 256, where K types hold, and of 128 and 96, where they do not."""

PLAIN = ("f32", "f16", "bf16", "q5_1", "q5_0", "q4_1")
"""File types without rules of their own."""


SHORT = (LayerShape(4, 2, 96), LayerShape(1, 1, 32), LayerShape(2, 1, 33))
"""Rows of one block of 32 where heads have 32 channels; rows of 24, 48 and 96 where they have 24."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    model = tiny_model(tiny_architecture(layers=LAYERS, hidden_size=256, head_dim=64))
    folder = made_once(tmp_path_factory, "wide", lambda folder: save_checkpoint(model, tokenizer, folder))
    return Checkpoint(folder, "wide")


@pytest.mark.parametrize(
    ("name", "head"), [*((name, "") for name in sorted(BODY) if name not in PLAIN), ("q4_0", "q4_0")]
)
def test_types_and_bytes_equal_those_of_the_file(name: str, head: str, wide: Checkpoint, tmp_path: Path) -> None:
    check_types_and_bytes(name, head, wide, tmp_path)


@pytest.mark.parametrize("head_dim", [32, 24])
@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0", "q4_k_m"])
def test_types_and_bytes_of_short_rows_equal_those_of_the_file(
    name: str, head_dim: int, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    architecture = tiny_architecture(layers=SHORT, hidden_size=48, head_dim=head_dim)
    check_types_and_bytes(name, "", Checkpoint(save_tiny(architecture), "short"), tmp_path)


def check_types_and_bytes(name: str, head: str, checkpoint: Checkpoint, folder: Path) -> None:
    plan = plan_layout(checkpoint, row_multiple(name))
    write_gguf(checkpoint, plan, folder / "exact.gguf")
    asked = tensor_type("--output-type", head)
    quantize_gguf(folder / "exact.gguf", folder / "out.gguf", FileTypes(name, asked, asked, False))
    stored = {tensor.name: tensor for tensor in read_header(folder / "out.gguf").tensors}
    expected = file_types(checkpoint.architecture, name, head, head)
    assert {each: NUMBERS[stored[gguf_name(each, plan)].kind] for each in expected} == expected
    size = sum(-(-num_bytes(tensor) // 32) * 32 + TENSOR_INFO_BYTES for tensor in stored.values())
    assert gguf_bytes(checkpoint.architecture, name, 0, head, head) == size


def test_ranking_by_bytes_prefers_a_stem_of_whole_k_blocks() -> None:
    """In a q2_k file, 64 stem channels less turn Q4_0 and Q8_0 tensors into K types: a third of the bytes."""
    source = tiny_architecture(layers=(LayerShape(4, 2, 1024),) * 4, hidden_size=576, head_dim=64)
    source = replace(source, vocab_size=4096)
    measure = bytes_of_file("q2_k", 0)
    whole, narrow = measure.of(source), measure.of(replace(source, hidden_size=512))
    assert narrow < 0.72 * whole
    kinds = PruneConfig(prune=("attention", "ffn", "stem")).kinds
    rules = SelectionRules(kinds, 32, measure=measure)
    scores = {
        "kv_group": [torch.full((2,), 1.0, dtype=torch.float64)] * 4,
        "query_head": [torch.full((4,), 0.5, dtype=torch.float64)] * 4,
        "ffn": [torch.full((1024,), 0.003, dtype=torch.float64)] * 4,
        "stem": [torch.full((576,), 0.06, dtype=torch.float64)],
    }
    after = select_removal(source, scores, rules, 0.75 * whole).after
    assert after == replace(source, hidden_size=512)
    dear = {**scores, "stem": [torch.full((576,), 1.0, dtype=torch.float64)]}
    assert select_removal(source, dear, rules, 0.9 * whole).after.hidden_size == 576
    fixed = replace(rules, fixed_stem=512)
    assert select_removal(source, dear, fixed, 0.9 * whole).after == replace(source, hidden_size=512)
    assert select_removal(source, scores, fixed, 0).after.hidden_size == 512
    with pytest.raises(UsageError, match="--stem-channels 608: the source has 576; give fewer"):
        check_smallest_size(PruneConfig(prune=("stem",), stem_channels=608, target_ratio=0.5), source)
    wide = replace(rules, fixed_stem=480)  # 512 channels would take fewer bytes
    with pytest.raises(UsageError, match=r"is too small: .* or give fewer --stem-channels"):
        check_budget(Budget(measure.of(smallest_architecture(source, fixed)), measure), source, wide)
    eight_bits = bytes_of_file("q8_0", 0)  # no steps there: FFN channels are the better bargain
    after = select_removal(source, scores, replace(rules, measure=eight_bits), 0.9 * eight_bits.of(source)).after
    assert after.hidden_size == 576
