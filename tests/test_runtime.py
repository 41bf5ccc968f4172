from __future__ import annotations

import io
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2.sandbox import SandboxedEnvironment

from efficientllm.runtime import chat, load
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError, ContextOverflowError, EfficientLLMError, UsageError
from efficientllm.runtime.chat_template import render_chat
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.memory import memory_bytes, trim_heap
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.prompt import chat_prompt
from efficientllm.runtime.sampling import SamplingOptions
from efficientllm.runtime.text_stream import TextStream


@pytest.fixture
def engine(artefact: Path) -> Iterator[EngineScheduler]:
    engine = load_engine(artefact, EngineOptions(threads=1))
    yield engine
    engine.close()


def test_prefix_reuse_gives_the_logits_of_a_fresh_prefill(engine: EngineScheduler) -> None:
    tokens = list(range(5, 45))
    engine.prefill([*tokens[:20], 300, 301, 302])
    engine.decode(303)
    reused = engine.prefill(tokens)
    engine.prefill([399])
    np.testing.assert_allclose(reused, engine.prefill(tokens), atol=2e-2)  # the cache is fp16


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_freed_memory_returns_to_the_system() -> None:
    blocks = [bytearray(60_000) for _ in range(2000)]  # below malloc's threshold for mappings of their own
    kept = blocks[1::40]  # memory above them cannot simply be cut off
    full = memory_bytes()["rss_anon_bytes"]
    del blocks
    trim_heap()
    assert memory_bytes()["rss_anon_bytes"] < full - 100e6
    assert len(kept) == 50


def test_decode_continues_prefill(engine: EngineScheduler) -> None:
    tokens = list(range(5, 30))
    whole = engine.prefill(tokens)
    engine.prefill([7])
    engine.prefill(tokens[:-1])
    np.testing.assert_allclose(engine.decode(tokens[-1]), whole, atol=2e-2)


def test_tokens_equal_the_tokenizer_and_bytes_make_the_text(engine: EngineScheduler, tokenizer: Any) -> None:
    text = "Größe 日本 🚀 <|im_end|> x = 12"
    tokens = engine.tokenize(text, special=True)
    assert tokens == tokenizer(text)["input_ids"]
    assert b"".join(engine.token_bytes(token) for token in tokens).decode() == text.replace("<|im_end|>", "")


def test_context_overflow_names_the_numbers(artefact: Path) -> None:
    engine = load_engine(artefact, EngineOptions(threads=1, context=64))
    limit = engine.context_length
    with pytest.raises(ContextOverflowError, match=f"{limit + 1} tokens do not fit the context window of {limit}"):
        engine.prefill([5] * (limit + 1))
    with pytest.raises(ContextOverflowError, match=f"the prompt has {limit} tokens and leaves no room"):
        Generation(engine, [5] * limit)
    generation = Generation(engine, [5] * (limit - 3), AnswerOptions(100))
    list(generation)
    assert generation.stats.completion_tokens <= 3
    engine.close()


def test_generation_is_measured(engine: EngineScheduler) -> None:
    generation = Generation(engine, engine.tokenize("A small model", special=False), AnswerOptions(8))
    text = "".join(generation)
    stats = generation.stats
    assert stats.prompt_tokens > 0
    assert stats.completion_tokens == 8 or stats.finish_reason == "stop"
    assert stats.time_to_first_token_ms > 0
    assert stats.decode_tokens_per_second > 0
    assert (
        text.encode()
        == b"".join(engine.token_bytes(token) for token in generation.tokens[stats.prompt_tokens :])
        .decode("utf-8", "replace")
        .encode()
    )


def test_chat_prompt_equals_transformers(engine: EngineScheduler, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello <there>"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Why?"},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert chat_prompt(engine, messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% set ns = namespace(f='{0.__class__.__mro__}'.format) %}{{ ns.f(ns) }}",
        "{% set ns = namespace(a=[]) %}{{ ns.a.append(1) }}",
    ],
)
def test_templates_are_sandboxed(template: str) -> None:
    with pytest.raises(UsageError, match="refuses"):
        render_chat(template, [{"role": "user", "content": "x"}])


def test_sandbox_does_not_check_methods_of_plain_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks take most of the time of a template that reads a long list."""
    checked: list[str] = []
    monkeypatch.setattr(SandboxedEnvironment, "is_safe_attribute", lambda self, obj, attr, _: not checked.append(attr))
    template = "{% set ns = namespace(a='x y') %}{{ ns.a.split(' ')[0].upper() }}{{ messages.count(1) }}"
    assert (render_chat(template, []), checked) == ("X0", ["count"])


def test_templates_without_a_prompt_are_refused() -> None:
    with pytest.raises(UsageError, match="roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", [])
    with pytest.raises(ArtefactError, match="malformed"):
        render_chat("{% for %}", [])
    with pytest.raises(ArtefactError, match="no chat template"):
        render_chat(None, [])


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ 'x' + 1 }}", "{{ 2.0 ** 9999 }}", "{{ messages[5].content.x }}"]
)
def test_a_template_that_fails_is_one_error(template: str) -> None:
    with pytest.raises(EfficientLLMError, match="chat template"):
        render_chat(template, [])


def test_training_marks_of_a_template_are_text() -> None:
    assert render_chat("a{% generation %}b{{ 1 }}{% endgeneration %}c", []) == "ab1c"


@pytest.mark.parametrize("seed", range(20))
def test_text_stream_never_shows_half_a_character_or_stop_string(seed: int) -> None:
    source = random.Random(seed)
    text = "".join(source.choice("abENDé日🚀 ") for _ in range(60)) + "END." + "tail END"
    data, pieces = text.encode(), []
    while data:
        size = source.randint(1, 5)
        pieces.append(data[:size])
        data = data[size:]
    stream = TextStream(["END.", "<|stop|>"])
    shown = ""
    for piece in pieces:
        shown += stream.push(piece)
        assert text.startswith(shown)
        assert not shown.endswith(("E", "EN", "END")) or text[len(shown) : len(shown) + 1] not in ("N", "D", ".")
    shown += stream.finish()
    assert stream.stopped
    assert shown == text[: text.index("END.")]


def test_text_stream_gives_back_a_stop_string_that_was_not_one() -> None:
    stream = TextStream(["STOP"])
    assert stream.push(b"a ST") == "a "
    assert stream.push(b"ART") == "START"
    assert stream.push(b" ST") == " "
    assert stream.finish() == "ST"
    assert not stream.stopped


def test_of_stop_strings_that_overlap_the_first_whole_one_ends_the_answer() -> None:
    for pieces in (["<aé"], ["<a", "é"], ["<", "a", "é"]):
        stream = TextStream(["<aé", "a"])
        assert "".join([*(stream.push(piece.encode()) for piece in pieces), stream.finish()]) == "<"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Well. <call>{stop}", "Well. <call>{stop}"),
        ("Well stop <call>{}", "Well "),
        ("a <calm> stop", "a <calm> "),
        ("a <ca", "a <ca"),
        ("it is <", "it is "),
        ("it is <b", "it is "),
        ("st<call>op", "st<call>op"),
        ("sto<", "sto"),
    ],
)
def test_stop_strings_end_at_a_call(text: str, shown: str) -> None:
    stops = ["stop", *(["<"] if text.startswith(("it is", "sto<")) else [])]
    for size in (1, 2, 3, len(text)):
        stream = TextStream(stops, until="<call>")
        pieces = [stream.push(text[start : start + size].encode()) for start in range(0, len(text), size)]
        assert "".join([*pieces, stream.finish()]) == shown
        assert stream.stopped == (shown != text)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", float("nan")), ("temperature", -1.0), ("top_p", 0.0), ("min_p", 2.0)]
)
def test_sampling_options_are_checked(name: str, value: float) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name.replace("_", "-")):
        SamplingOptions(**options)


def test_chat_answers_once_and_from_a_pipe(
    artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(artefact), "--max-tokens", "8", "--threads", "1", "--stats"]
    assert run_command(chat.body, [*arguments, "Hello"]) == 0
    asked = capsys.readouterr()
    with load(artefact, EngineOptions(threads=1)) as model:  # a small model without settings of its own
        assert asked.out == model.chat("Hello", max_tokens=8, repetition_penalty=1.1) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert run_command(chat.body, arguments) == 0
    assert capsys.readouterr().out == asked.out
    assert "time to first token" in asked.err


def test_conversation_survives_a_question_that_is_too_long(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = load_engine(artefact, EngineOptions(threads=1, context=64))
    conversation = chat.Conversation(engine, chat.ChatOptions(max_tokens=4), SamplingOptions())
    with pytest.raises(ContextOverflowError):
        conversation.ask("word " * 500)
    assert conversation.messages == []
    conversation.ask("Hi")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    capsys.readouterr()
    engine.close()


def test_bad_artefacts_give_one_line(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (artefact / "model.gguf").read_bytes()
    for name, content in {"foreign": b"not a model", "truncated": data[: len(data) // 2], "empty": b""}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        # a fresh process: what a user would see, llama.cpp's own log included
        command = [sys.executable, "-m", "efficientllm.runtime.start", "chat", str(tmp_path / f"{name}.gguf"), "Hi"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert f"{name}.gguf is" in done.stderr
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "manifest.json").write_text((artefact / "manifest.json").read_text())
    (copied / "model.gguf").write_bytes(data[:-100])
    assert run_command(chat.body, [str(copied), "Hi"]) == 2
    assert "copy it again" in capsys.readouterr().err
    assert run_command(chat.body, [str(tmp_path / "nowhere"), "Hi"]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run_command(chat.body, [str(tmp_path / "empty"), "Hi"]) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
