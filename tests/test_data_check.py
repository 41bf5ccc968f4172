"""`efficientllm-data check`: counts, lengths, repetitions, refusals, and examples with the learned text marked."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import ERRORS
from transformers import PreTrainedTokenizerFast

from efficientllm.runtime.base.command import run_command
from efficientllm.train.config.sections import SourceConfig
from efficientllm.train.data.call_check import CallCheck
from efficientllm.train.data.chat import Chat, Encoder
from efficientllm.train.data.check import CheckConfig, body, check_file, rendered, rows
from efficientllm.train.data.documents import DataSpec, open_documents
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


def test_the_default_sequence_equals_that_of_training() -> None:
    assert CheckConfig().sequence_length == SourceConfig().sequence_length


def test_records_are_counted_by_form(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", [*FORMS.values(), FORMS["chat"]])
    report = check_file(DataSpec(str(path)), Encoder(tokenizer), 64)
    assert report.forms == dict.fromkeys(FORMS, 1) | {"chat": 2}
    assert report.repeated.count == 1
    assert not report.refusals.errors


def test_lengths_equal_those_of_training_and_long_chats_are_counted(
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
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, capsys: ERRORS
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
    tmp_path: Path, source_folder: Path, capsys: ERRORS
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


def test_refused_records_are_named_and_the_others_reported(tmp_path: Path, source_folder: Path, capsys: ERRORS) -> None:
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
    tmp_path: Path, source_folder: Path, capsys: ERRORS
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


PROPERTIES = {"name": {"type": "string"}, "level": {"type": "integer"}, "on": {"type": "boolean"}}
SET = {"type": "function", "function": {"name": "set", "parameters": {"properties": PROPERTIES, "required": ["name"]}}}
WARM = {"name": "fan", "parameters": {"properties": {"name": {"type": "string"}, "mode": {"type": "string"}}}}
ODD = {"function": {"name": "odd", "parameters": {"properties": ["a"]}}}


def example(request: str, function: str = "set", tools: Sequence[object] = (), **arguments: object) -> Any:
    call = {"id": "call_0", "type": "function", "function": {"name": function, "arguments": json.dumps(arguments)}}
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return {"messages": messages, **({"tools": tools} if tools else {})}


def found_in(folder: Path, train: Sequence[Any], test: Sequence[Any]) -> list[str]:
    """Return the warnings about examples, with the names of their files alone."""
    check = CallCheck()
    for name, records in (("train", train), ("test", test)):
        for document in open_documents(DataSpec(str(write(folder / f"{name}.jsonl", records)))):
            assert isinstance(document, Chat)
            check.add(document, f"{name}.jsonl", name == "test")
    return [line.replace(f"{folder}/", "") for line in check.lines()]


SOUND = [example(f"Set lamp {index} to {index}", name=f"lamp {index}", level=index) for index in range(30)]
SOUND += [example(f"Lamp {index} on", name=f"lamp {index}", on=index % 2 == 0) for index in range(30)]
REFUSED = [
    {"messages": [{"role": "user", "content": f"Joke {index}"}, {"role": "assistant", "content": "No."}]}
    for index in range(5)
]
SOUND += REFUSED
TESTED = [
    example(f"Set oven {index} to {index}", tools=(SET,), name=f"oven {index}", level=index) for index in range(4)
]
PLANTED: dict[str, tuple[list[Any], list[Any], str]] = {
    "order": (
        [example("dim", level=1, name="hall")],
        [],
        "1 calls with arguments in another order than the properties or most calls; first: set(level, name) in "
        "train.jsonl: line 66",
    ),
    "type": (
        [example("dim", name="hall", level="one"), example("dim it", name="x", level="two")],
        [],
        "2 calls with an argument of another type than its schema or most calls; first: set(level: text) in "
        "train.jsonl: line 66",
    ),
    "argument": (
        [example("dim", name="hall", speed=3)],
        [],
        "1 calls with arguments that no tools have; first: set(name, speed) in train.jsonl: line 66",
    ),
    "function": (
        [example("dim", "dim", name="hall")],
        [],
        "1 calls of functions that no tools have; first: dim(name) in train.jsonl: line 66",
    ),
    "answers": (
        [example("Lamp 3 on", name="lamp 4", on=True), example("Lamp 3 on", name="x", on=True)],
        [],
        "1 requests have two different answers; first: train.jsonl: line 66",
    ),
    "forbidden": (
        [],
        [example("now", tools=(SET,), name="hall"), example("dim", tools=(SET,), level=3)],
        "1 calls of the test do not follow their own tools, so that --constrain schema cannot write them; first: "
        'test.jsonl: line 6: set takes no level": 3} after {"',
    ),
    "same": (
        [],
        [example("Lamp 3 on", tools=(SET,), name="lamp 3", on=True)],
        "1 requests of the test are in the training files; first: test.jsonl: line 5",
    ),
    "case": (
        [],
        [example("LAMP 3  on", tools=(SET,), name="lamp 3", on=True)],
        "1 requests of the test are in the training files, in another case or spacing; first: test.jsonl: line 5",
    ),
    "tools": (
        [],
        [example("dim", name="hall", level=1)],
        "1 of 5 chats in test.jsonl have no tools; first: test.jsonl: line 5",
    ),
    "one value": (
        [example(f"Fan {index}", "fan", name=f"fan {index}", mode="cool") for index in range(30)],
        [example("Fan", "fan", tools=({"function": WARM}, ODD), name="fan", mode="warm")],
        "1 arguments have one value in the training files, and the model will write no other; first: "
        'fan(mode: "cool") in 30 calls',
    ),
}


def test_sound_examples_have_no_warning(tmp_path: Path) -> None:
    assert found_in(tmp_path, SOUND, TESTED) == []


def test_check_warns_of_few_and_of_repeated_refusals(tmp_path: Path) -> None:
    (few,) = found_in(tmp_path, SOUND[:-3], TESTED)
    assert few.startswith("2 of 62 requests in train.jsonl have no call, so the model will call")
    repeated = found_in(tmp_path, [*SOUND, *REFUSED[:2] * 3], TESTED)
    assert repeated == ["11 of 71 requests in train.jsonl have no call, and only 5 of these are different"]


@pytest.mark.parametrize("case", PLANTED)
def test_check_warns_of_each_planted_defect_alone(case: str, tmp_path: Path) -> None:
    train, test, expected = PLANTED[case]
    assert found_in(tmp_path, [*SOUND, *train], [*TESTED, *test]) == [expected]


def test_report_has_a_row_for_each_function_and_the_warnings(
    tmp_path: Path, source_folder: Path, capsys: ERRORS
) -> None:
    train = write(tmp_path / "train.jsonl", [*SOUND, *PLANTED["order"][0], SOUND[0], SOUND[0]])
    test = write(tmp_path / "test.jsonl", TESTED)
    assert run_command(body, ["check", str(train), "--test", str(test), "--source", str(source_folder)]) == 0
    out = capsys.readouterr().out
    assert "| set | 63 | 4 | 99% of 67 |" in out
    assert "| no call | 5 | 0 | - |" in out
    assert "\nnote: 68 chats; the home job's shares of right requests are 0.36 from 50, 0.69 from 200 and" in out
    assert "\nwarning: 1 calls with arguments in another order" in out
    assert f"\nwarning: 2 records are repeated in train.jsonl; first: {train}: line 67" in out
