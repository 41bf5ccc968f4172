"""What a GGUF says of itself, and the Modelfile beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import export
from gguf import GGUFReader
from tiny import tiny_architecture

from efficientllm.runtime.engines.artefact import Artefact

CARD = """---
license: apache-2.0
tags: [efficientllm, pruned]
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
datasets: [HuggingFaceTB/smollm-corpus]
---
# A model
"""


def general_fields(path: Path) -> dict[str, Any]:
    fields = GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("general.")}


def test_file_repeats_the_facts_of_its_card(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture())
    (checkpoint / "README.md").write_text(CARD)
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "q8_0", "--no-verify") == 0
    found = general_fields(tmp_path / "gguf" / "model.gguf")
    told = {
        "general.type": "model",
        "general.name": "checkpoint",
        "general.size_label": "135K",
        "general.license": "apache-2.0",
        "general.tags": ["efficientllm", "pruned"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "SmolLM2 135M Instruct",
        "general.base_model.0.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        "general.dataset.0.repo_url": "https://huggingface.co/HuggingFaceTB/smollm-corpus",
    }
    assert {name: found.get(name) for name in told} == told


@pytest.mark.parametrize("card", [None, "no header", "---\nlicense: [\n---\n", "---\n- a list\n---\n"])
def test_a_missing_or_damaged_card_costs_nothing_else(
    card: str | None, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_tiny(tiny_architecture())
    (checkpoint / "README.md").unlink(missing_ok=True)
    if card is not None:
        (checkpoint / "README.md").write_text(card)
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32", "--no-verify") == 0
    found = general_fields(tmp_path / "gguf" / "model.gguf")
    assert (found["general.type"], found["general.size_label"]) == ("model", "135K")
    assert "general.license" not in found


def test_the_modelfile_has_context_sampling_and_ends_and_may_be_changed(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = save_tiny(tiny_architecture())
    defaults = {"temperature": 0.2, "top_p": 9.0, "eos_token_id": [2, 0]}
    (checkpoint / "generation_config.json").write_text(json.dumps(defaults))
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32", "--no-verify") == 0
    modelfile = tmp_path / "gguf" / "Modelfile"
    *parameters, template = modelfile.read_text().splitlines()
    assert template.startswith('TEMPLATE """{{- range $i, $_ := .Messages }}')  # tests/test_go_template.py
    assert parameters == [
        "FROM ./model.gguf",
        "PARAMETER num_ctx 512",
        "PARAMETER temperature 0.2",
        "PARAMETER top_p 0.95",  # what the checkpoint says is none
        "PARAMETER repeat_penalty 1.1",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
    ]
    modelfile.write_text("FROM ./model.gguf\n")
    Artefact.open(tmp_path / "gguf").verify()
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32", "--no-verify", "--overwrite") == 2
    assert modelfile.read_text() == "FROM ./model.gguf\n"
