"""Tokenizers of the supported families in GGUF: the same ids as tokenizer.json, by the gate of every export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import export
from tiny import tiny_architecture
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from efficientllm.export.gguf.probe import probe
from efficientllm.export.verification import sample_text
from efficientllm.runtime.engines.hf_tokenizer import read_chat_template
from efficientllm.train.model.file_types import build_pre_tokenizer, pre_tokenizer_name

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"\p{N}{1,3}" + PUNCTUATION
QWEN2 = CONTRACTIONS + r"\p{N}" + PUNCTUATION


def byte_level(*before: Any, use_regex: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    steps = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if before else steps[0]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=397, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([sample_text()], trainer)
    return backend


def sentencepiece() -> Tokenizer:
    """Llama 2's layout: BPE with byte fallback over '▁' words, scores by id."""
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=397, special_tokens=special, limit_alphabet=60, show_progress=False)
    backend.train_from_iterator([sample_text().replace("\n", " ")] * 3, trainer)
    data = json.loads(backend.to_str())
    # the trainer numbers letters before merges; in SentencePiece models merges come first, letters last
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    vocabulary = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    letters = [token for token in vocabulary if len(token) == 1]
    merged = [token for token in vocabulary if token not in special and len(token) > 1]
    order = [*special, *merged, *letters]
    data["model"]["vocab"] = {token: index for index, token in enumerate(order)}
    backend = Tokenizer.from_str(json.dumps(data))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(use_regex=True),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": lambda: byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), use_regex=False),
    "qwen2": lambda: byte_level(pre_tokenizers.Split(Regex(QWEN2), "isolated"), use_regex=False),
    "default": sentencepiece,
}


@pytest.mark.parametrize("pre", BACKENDS)
def test_token_ids_equal_on_every_kind(pre: str, save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    import gguf

    backend = BACKENDS[pre]()
    if pre != "default":
        backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|bos|>", "<|eos|>", "<|user|>")])
    names = ("<s>", "</s>") if pre == "default" else ("<|bos|>", "<|eos|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[1])
    checkpoint = save_tiny(tiny_architecture())
    tokenizer.save_pretrained(checkpoint)
    assert export(checkpoint, "gguf", tmp_path / "gguf", "--quantize", "f32") == 0
    path = tmp_path / "gguf" / "model.gguf"
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == pre
    text = "Ça va? 12345 don't <|user|>🙂\n\n  x"
    assert probe(path, [3, 4], [text]).token_ids[0] == backend.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_that_differs_is_refused(
    save_tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from efficientllm.export.gguf import writer

    checkpoint = save_tiny(tiny_architecture())
    PreTrainedTokenizerFast(tokenizer_object=BACKENDS["gpt-2"](), eos_token="!").save_pretrained(checkpoint)
    monkeypatch.setattr(writer, "pre_tokenizer_name", lambda data: "smollm")  # which splits digits
    assert export(checkpoint, "gguf", tmp_path / "gguf") == 2
    assert "tokenises the sample differently" in capsys.readouterr().err
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "qwen2"])
def test_names_of_pre_tokenizers_lead_both_ways(name: str) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = build_pre_tokenizer(name)
    assert pre_tokenizer_name(json.loads(backend.to_str())) == name


def test_a_list_of_chat_templates_is_none(tmp_path: Path) -> None:
    settings = {"chat_template": [{"name": "default", "template": "{{ messages }}"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_chat_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_chat_template(tmp_path) == "{{ messages }}"
