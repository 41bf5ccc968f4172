"""`efficientllm-data check`: counts, lengths, repetitions, refusals, and examples with the learned text marked."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from efficientllm.runtime.base.command import run_command
from efficientllm.train.config.sections import SourceConfig
from efficientllm.train.data.chat import Chat, Encoder
from efficientllm.train.data.check import CheckConfig, body, check_file, rendered, rows
from efficientllm.train.data.documents import DataSpec
from efficientllm.train.data.packing import PackedStream

TOOL = {"type": "function", "function": {"name": "now"}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}]}
ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
FORMS: dict[str, Mapping[str, object]] = {
    "chat": {"messages": [ASKED, ANSWERED]},
    "chat with functions": {"messages": [ASKED, CALL], "tools": [TOOL]},
    "prompt and completion": {"prompt": "How?", "completion": "So."},
    "Alpaca": {"instruction": "Count.", "output": "One, two."},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Ciao"}]},
    "text": {"text": "A text without a question."},
}


def write(path: Path, records: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def cells(table: list[list[str]]) -> dict[str, list[str]]:
    return {name: values for name, *values in table}


def test_the_default_sequence_is_that_of_training() -> None:
    assert CheckConfig().sequence_length == SourceConfig().sequence_length


def test_records_are_counted_by_form(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", [*FORMS.values(), FORMS["chat"]])
    report = check_file(DataSpec(str(path)), Encoder(tokenizer), 64)
    assert report.forms == dict.fromkeys(FORMS, 1) | {"chat": 2}
    assert report.num_repeated == 1
    assert not report.refusals.errors


def test_lengths_are_those_of_training_and_long_chats_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    chats = [Chat.of(("user", "Hi"), ("assistant", "so " * count)) for count in (1, 5, 100)]
    path = write(tmp_path / "a.jsonl", [json.loads(chat.to_json()) for chat in chats])
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(chats)
    report = check_file(DataSpec(str(path)), encoder, 60)
    assert report.learned_tokens == [int((ids >= 0).sum()) for ids in encoded]
    assert report.prompt_tokens == [int((ids < 0).sum()) for ids in encoded]
    assert report.num_cut == sum(len(ids) > 60 for ids in encoded) == 1
    shown = cells(rows([report], [], 60))
    assert shown["chats over 60 tokens, which windows cut"] == ["1"]
    assert shown["tokens of one pass"][0] == f"{sum(map(len, encoded)):,}"
    assert shown["whole tokens, median / 95 % / maximum"][0].endswith(f" / {len(encoded[2]):,}")
    middle, _, longest = shown["learned tokens, median / 95 % / maximum"][0].split(" / ")
    assert (int(middle), int(longest)) == (report.learned_tokens[1], report.learned_tokens[2])


def test_prompts_of_learned_functions_do_not_describe_them(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("efficientllm.train.model.source.load_tokenizer", lambda source: copy.deepcopy(tokenizer))
    path = write(tmp_path / "a.jsonl", [FORMS["chat with functions"]])
    shown = {}
    for functions in ("described", "learned"):
        assert run_command(body, ["check", str(path), "--functions", functions]) == 0
        shown[functions] = capsys.readouterr().out
    assert "You can call functions" in shown["described"]
    assert "You can call functions" not in shown["learned"]


def test_a_chat_that_windows_cut_is_named_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    chats = [Chat.of(("user", "Hi"), ("assistant", "so " * count)) for count in (1, 50, 60)]
    path = write(tmp_path / "a.jsonl", [json.loads(chat.to_json()) for chat in chats])
    for length, expected in ((512, 0), (16, 1)):
        caplog.clear()
        stream = PackedStream([DataSpec(str(path))], tokenizer, length, 0.05, seed=0)
        stream.next_windows(8)
        assert len([each for each in caplog.messages if "cut it; efficientllm-data check" in each]) == expected


def test_requests_of_the_test_are_found_whatever_their_answer(
    tmp_path: Path, source_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.jsonl", [FORMS["chat"], FORMS["chat with functions"], FORMS["Alpaca"]])
    other = {"messages": [ASKED, {"role": "assistant", "content": "Good morning."}]}
    test = write(tmp_path / "test.jsonl", [other, FORMS["ShareGPT"]])
    assert run_command(body, ["check", f"{train}:0.5", "--test", str(test), "--source", str(source_folder)]) == 0
    out = capsys.readouterr().out
    assert "|  | train.jsonl | test.jsonl |" in out
    assert "| requests that are also in --test | 2 |  |" in out
    assert "[[Hello.<|im_end|>\n]]" in out
    assert "Ciao" not in out  # the examples are those of training


def test_refused_records_are_named_and_the_others_reported(
    tmp_path: Path, source_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = {"messages": [ASKED, {"role": "assistant", "content": ""}]}
    null = {"messages": [ASKED, {"role": "assistant", "content": None}]}
    path = write(tmp_path / "a.jsonl", [FORMS["chat"], empty, {"question": "Hi"}, null])
    assert run_command(body, ["check", str(path), "--source", str(source_folder)]) == 2
    out, err = capsys.readouterr()
    assert "| records, chat | 1 |" in out
    assert "| refused | 3 |" in out
    assert "| refused for an empty answer | 2 |" in out
    assert f'refused: FILE {path}: message 2 of line 2 has an empty "content"' in out
    assert f'refused: FILE {path}: line 3 has no field "text"; it has question' in out
    assert err.endswith("error: training refuses 3 of the records; correct or remove them\n")


def test_a_file_without_documents_is_refused_as_in_training(
    tmp_path: Path, source_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [])
    assert run_command(body, ["check", str(path), "--source", str(source_folder)]) == 2
    assert "a.jsonl has no documents; give other text" in capsys.readouterr().err


def test_a_chat_that_the_template_refuses_is_named_by_its_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = {"messages": [ASKED, ANSWERED, ASKED, ANSWERED]}
    path = write(tmp_path / "a.jsonl", [FORMS["chat"], long])
    original = tokenizer.chat_template
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] + message['content'] + '#' }}"
    tokenizer.chat_template += "{% if loop.last and loop.index > 2 %}{{ raise_exception('too long') }}{% endif %}"
    tokenizer.chat_template += "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    try:
        report = check_file(DataSpec(str(path)), Encoder(tokenizer), 64)
    finally:
        tokenizer.chat_template = original
    (error,) = report.refusals.errors
    assert str(error).startswith(f"--data {path}: line 2: a chat of 4 turns: ")
    assert sum(report.forms.values()) == 1


def test_learned_text_is_marked_and_control_characters_are_escaped(tokenizer: PreTrainedTokenizerFast) -> None:
    (ids,) = Encoder(tokenizer).encode([Chat.of(("user", "Hi\x1b[2J"), ("assistant", "Yes"), ("user", "Bye"))])
    shown = rendered(ids, tokenizer, ("\x1b[7m", "\x1b[0m"))
    assert shown == "<|im_start|>user\nHi\\x1b[2J<|im_end|>\n<|im_start|>assistant\n\x1b[7mYes<|im_end|>\n\x1b[0m"
    assert rendered(np.asarray([5]), tokenizer, ("[[", "]]")).startswith("[[")
