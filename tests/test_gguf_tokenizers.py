"""Tokenizers of the supported families in GGUF: the same ids as tokenizer.json, by the gate of every export."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import export
from odd_tokenizers import BACKENDS, ENDS, run_cases
from tiny import tiny_architecture
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from efficientllm.export.gguf.probe import probe
from efficientllm.runtime.engines.hf_tokenizer import read_chat_template
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.train.model.file_types import build_pre_tokenizer, pre_tokenizer_name
from efficientllm.train.model.source import load_tokenizer


@pytest.mark.parametrize("pre", BACKENDS)
def test_token_ids_equal_on_every_kind(pre: str, save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    import gguf

    backend = BACKENDS[pre]()
    if pre != "default":
        backend.add_special_tokens([AddedToken("<|user|>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    checkpoint = save_tiny(tiny_architecture())
    tokenizer.save_pretrained(checkpoint)
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32") == 0
    path = tmp_path / "gguf" / "model.gguf"
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == pre
    text = "Ça va? 12345 don't <|user|>🙂\n\n  x"
    assert probe(path, [3, 4], [text]).token_ids[0] == backend.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_that_differs_is_refused(
    save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from efficientllm.export.gguf import tokenizer

    checkpoint = save_tiny(tiny_architecture())
    PreTrainedTokenizerFast(tokenizer_object=BACKENDS["gpt-2"](), eos_token="!").save_pretrained(checkpoint)
    monkeypatch.setattr(tokenizer, "pre_tokenizer_name", lambda data: "smollm")  # which splits digits
    assert export(checkpoint, "gguf", tmp_path / "gguf") == 2
    assert "tokenises the sample differently" in capsys.readouterr().err
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2"])
def test_names_of_pre_tokenizers_lead_both_ways(name: str) -> None:
    backend = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer = build_pre_tokenizer(name)
    assert pre_tokenizer_name(json.loads(backend.to_str())) == name


@pytest.mark.parametrize("pre", ["llama-bpe", "dbrx"])
def test_source_merges_within_words_as_its_file_does(pre: str, save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_tiny(tiny_architecture())
    PreTrainedTokenizerFast(tokenizer_object=BACKENDS[pre](), eos_token="</s>").save_pretrained(checkpoint)
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--no-verify") == 0
    read: Any = load_tokenizer(str(tmp_path / "gguf" / "model.gguf"))
    assert read.backend_tokenizer.model.ignore_merges == (pre == "llama-bpe")


def test_list_of_chat_templates_gives_no_template(tmp_path: Path) -> None:
    settings = {"chat_template": [{"name": "default", "template": "{{ messages }}"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_chat_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_chat_template(tmp_path) == "{{ messages }}"


LOST = {
    "rstrip special, SentencePiece": (
        "named",
        "llama.cpp has no rstrip of <|user|>: it splits '<|user|> ' differently",
    ),
    "lstrip, BPE": ("named", "llama.cpp has no lstrip of <tool>: it splits ' <tool>' differently"),
    "single word, BPE": ("named", "llama.cpp has no single_word of cat: it splits 'acatb' differently"),
    "Phi-3, SentencePiece": ("named", "llama.cpp strips ASCII spaces after Phi-3's special tokens, and no others"),
    "NFC, BPE": ("named", "llama.cpp has no NFC: it splits"),
    "line ends, BPE": ("named", "llama.cpp has no Replace of '\\r\\n': it splits '\\r\\n' differently"),
    "a rare word, BPE": ("named", "llama.cpp has no Replace of 'colou?r'"),
    "qwen2 unmerged ignore_merges": ("named", "llama.cpp has no ignore_merges: it splits"),
    "nothing, SentencePiece": ("named", "llama.cpp has three end tokens: it does not end an answer at"),
    "Metaspace first True": ("refused", "llama.cpp has no Metaspace, without which this tokenizer splits plain text"),
    "Metaspace never False": ("equal", ""),
    "lower case, BPE": ("refused", "llama.cpp has no Lowercase, without which this tokenizer splits plain text"),
    "overlapping, BPE": ("refused", "tokenises the sample differently from tokenizer.json"),
    "merges reversed": ("refused", "tokenises the sample differently from tokenizer.json"),
    "a pattern with more": ("refused", "has no known name in llama.cpp"),
    "nothing, BPE": ("equal", ""),
    "qwen2 plain ignore_merges": ("equal", ""),
    "dbrx unmerged": ("equal", ""),
    "llama-bpe unmerged": ("equal", ""),
    "a pad, BPE": ("equal", ""),
}
"""Case of odd_tokenizers.py -> its outcome and a part of the reason."""


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_gguf_refuses_or_names_dropped_parts_of_a_tokenizer(tmp_path: Path) -> None:
    found = run_cases(LOST, tmp_path, count=100)
    assert {name: outcome for name, (outcome, _) in found.items()} == {
        name: outcome for name, (outcome, _) in LOST.items()
    }
    assert all(reason in found[name][1] for name, (_, reason) in LOST.items()), found
    assert not found["Metaspace never False"][1]
    assert len(ENDS["nothing, BPE"]) == 3  # which a file stores as eos, eot and eom


def test_the_last_line_and_the_manifest_name_a_lost_field(
    save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_tiny(tiny_architecture())
    path = checkpoint / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32", "--no-verify") == 0
    limits = Manifest.read(tmp_path / "gguf").limits
    assert limits[0] == "not verified"
    assert limits[1].startswith("llama.cpp has no NFC: it splits 'the\\u0300in the' differently")
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"; {limits[1]}")


def test_a_name_with_phi_3_is_written_so_that_llama_cpp_loads_the_file(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    import gguf

    checkpoint = save_tiny(tiny_architecture()).rename(tmp_path / "Phi-3-small")
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32") == 0
    assert gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields["general.name"].contents() == "phi 3-small"
