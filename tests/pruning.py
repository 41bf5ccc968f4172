"""Random scores of a tiny model's groups, and what they remove."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tiny import UNEQUAL

from efficientllm.train.model.architecture import Architecture, LayerShape
from efficientllm.train.model.groups import BLOCKS, KINDS
from efficientllm.train.pruning.rules import SelectionRules
from efficientllm.train.pruning.running_scores import Scores
from efficientllm.train.pruning.selection import Removal, Unit, select_removal

LAYERS = (*UNEQUAL, LayerShape(6, 2, 64))


def random_scores(architecture: Architecture, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator)

    return {
        "kv_group": [draw(layer.num_key_value_heads) for layer in architecture.layers],
        "query_head": [draw(layer.num_attention_heads) for layer in architecture.layers],
        "ffn": [draw(layer.intermediate_size) for layer in architecture.layers],
        "stem": [draw(architecture.hidden_size)],
        "vocabulary": [draw(architecture.vocab_size)],
        **{block: list(draw(len(architecture.layers)).split(1)) for block in BLOCKS},
    }


def past(count: int) -> Callable[[Unit, Sequence[Unit]], bool]:
    """Stop a selection after this many units."""
    return lambda unit, taken: len(taken) == count


def some_removal(architecture: Architecture, kinds: tuple[str, ...], units: int = 7) -> Removal:
    """`kinds`: of groups and of blocks."""
    scores = random_scores(architecture)
    groups, blocks = (tuple(kind for kind in kinds if kind in table) for table in (KINDS, BLOCKS))
    rules = SelectionRules(groups, width_multiple=8, blocks=blocks)
    removal = select_removal(architecture, {kind: scores[kind] for kind in kinds}, rules, 0, stop_before=past(units))
    assert removal.units
    return removal
