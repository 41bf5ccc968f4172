"""Chats as training data: what is read, what is learned, and chats that a model holds with itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tiny import tiny_architecture, tiny_model
from training import command, metrics, run
from transformers import PreTrainedTokenizerFast

from efficientllm.runtime.base.errors import DataError, UsageError
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.prompt import ToolUse, tool_prompt
from efficientllm.runtime.tool_format import tool_format
from efficientllm.train.checkpoint.state import as_arrays, as_tensors
from efficientllm.train.compute.loss import LossWeights, TrainingLoss
from efficientllm.train.config.sections import SourceConfig
from efficientllm.train.data.chat import Chat, ChatFormat, Encoder
from efficientllm.train.data.documents import DataSpec, is_held_out, open_documents, open_texts
from efficientllm.train.data.packing import PackedStream
from efficientllm.train.data.self_chat import OPENINGS, sample_chats
from efficientllm.train.loop.run_text import RunText

CHAT = Chat.of(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Ciao"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    lines = []
    for index in range(200):
        messages = [
            {"role": "user", "content": f"What is {index}?"},
            {"role": "assistant", "content": f"It is {index}."},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def text_of(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist()))


def test_answers_and_ends_of_turns_are_learned_the_rest_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, cut = (Encoder(tokenizer).encode([Chat(CHAT.messages, is_cut=is_cut)])[0] for is_cut in (False, True))
    whole = text_of(tokenizer, np.where(ids < 0, ~ids, ids))
    assert whole == tokenizer.apply_chat_template([dict(each) for each in CHAT.messages], tokenize=False)
    assert text_of(tokenizer, ids[ids >= 0]) == "Hello.<|im_end|>\nCiao<|im_end|>\n"
    assert text_of(tokenizer, cut[cut >= 0]) == "Hello.<|im_end|>\nCiao"  # whose end was not said


def test_tokens_that_are_only_read_give_no_loss_and_no_gradient(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tiny_architecture())
    ids = Encoder(tokenizer).encode([CHAT])[0].astype(np.int64)
    window = torch.from_numpy(ids)[None]
    loss = TrainingLoss(model, torch.float32, LossWeights(1.0, 1.0), teacher=tiny_model(tiny_architecture(), seed=5))
    total, cross_entropy = loss(window)
    total.backward()
    logits = model(torch.where(window < 0, ~window, window)[:, :-1]).logits[0]
    targets = window[0, 1:]
    expected = torch.nn.functional.cross_entropy(logits[targets >= 0], targets[targets >= 0])
    assert float(cross_entropy.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    only_read = torch.where(window < 0, window, ~window)
    model.zero_grad()
    total, cross_entropy = loss(only_read)
    total.backward()
    assert float(total.detach()) == float(cross_entropy.detach()) == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_records_with_messages_are_chats(chats: Path, suffix: str, tmp_path: Path) -> None:
    if suffix == ".parquet":
        rows = [json.loads(line) for line in chats.read_text().splitlines()]
        chats = tmp_path / "chats.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), chats)
    documents = list(open_documents(DataSpec(str(chats))))
    assert documents[7] == Chat.of(("user", "What is 7?"), ("assistant", "It is 7."))
    assert next(iter(open_texts(DataSpec(str(chats))))) == "What is 0?\n\nIt is 0."
    assert 20 < sum(is_held_out(document, 0.2) for document in documents) < 60


ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
CALLS = [{"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]
TOOL = {"type": "function", "function": {"name": "now", "description": "The time."}}


def answer(**fields: object) -> dict[str, object]:
    return {"messages": [ASKED, {**ANSWERED, **fields}]}


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "older functions": (
        {"messages": [ASKED, ANSWERED], "functions": [TOOL["function"]]},
        '{} 2 has the older field "functions"; convert it to "tools"',
    ),
    "an older call": (
        answer(content=None, function_call=CALLS[0]["function"]),
        'message 2 of {} 2 has the older field "function_call"; convert it to "tool_calls"',
    ),
    "an older result": (
        {"messages": [ASKED, {"role": "function", "content": "8 am"}, ANSWERED]},
        'message 2 of {} 2 has the "role" function; name it tool',
    ),
    "null": (answer(content=None), 'message 2 of {} 2 has a "content" that is null; give it a text'),
    "null of a question": ({"messages": [{"role": "user", "content": None}, ANSWERED]}, 'message 1 of {} 2 has a "con'),
    "nothing": (answer(content=""), 'message 2 of {} 2 has an empty "content", which is no answer; give it a text'),
    "blank": (answer(content=" \n"), 'message 2 of {} 2 has an empty "content"'),
    "another weight": (
        answer(weight=0.5),
        'message 2 of {} 2 has the "weight" 0.5; give 0 for an answer that is not learned, or 1',
    ),
    "a call of a user": (
        {"messages": [{**ASKED, "tool_calls": CALLS}, ANSWERED]},
        'message 1 of {} 2 has "tool_calls", which only an assistant\'s message can have',
    ),
    "a call without a name": (
        answer(tool_calls=[{"type": "function", "function": {"arguments": "{}"}}]),
        'a call in message 2 of {} 2 must be {"function": {"name": ..., "arguments": ...}}',
    ),
    "arguments that are not JSON": (
        answer(tool_calls=[{"type": "function", "function": {"name": "now", "arguments": "{"}}]),
        'the "arguments" of a call in message 2 of {} 2 is not JSON',
    ),
    "arguments that are no number": (
        answer(tool_calls=[{"function": {"name": "now", "arguments": {"x": float("nan")}}}]),
        'the "arguments" of a call in message 2 of {} 2 have NaN or Infinity, which JSON does not have',
    ),
    "tools without names": (
        {"messages": [ASKED, ANSWERED], "tools": [{"type": "function"}]},
        'the "tools" of {} 2 must be a list of',
    ),
    "parameters that are no schema": (
        {"messages": [ASKED, ANSWERED], "tools": [{"function": {"name": "now", "parameters": "[1]"}}]},
        'the "parameters" of a function of {} 2 must be a JSON schema, which is an object',
    ),
    "another role": ({"messages": [{**ASKED, "role": "bot"}, ANSWERED]}, 'message 1 of {} 2 has the "role" bot; known'),
}
"""Records that training would misread, and the message about them."""


everywhere = pytest.mark.parametrize("place", ["line", "document", "row", "hub row"])


def written(rows: list[dict[str, object]], place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write rows as a corpus whose errors call a row `place`, and return its --data."""
    if place == "hub row":
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
        return "owner/name"
    path = folder / {"line": "a.jsonl", "document": "a.json", "row": "a.parquet"}[place]
    if place == "line":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif place == "document":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        names = dict.fromkeys(name for row in rows for name in row)
        table = {name: pyarrow.array([row.get(name) for row in rows]) for name in names}  # null where there is none
        parquet.write_table(pyarrow.table(table), path)
    return str(path)


@everywhere
@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_chat_is_refused_by_field(
    case: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record, message = REFUSED[case]
    name = written([{"messages": [ASKED, ANSWERED]}, record, answer(content="Bye.")], place, tmp_path, monkeypatch)
    with pytest.raises(DataError) as caught:
        list(open_documents(DataSpec(name)))
    said = str(caught.value)
    expected = message.replace("{} 2", f"{place.removeprefix('hub ')} 2")
    assert said.startswith(f"--data {name}: {expected}")
    assert said.endswith("; --skip-bad-lines N leaves out up to N such lines")
    assert "\n" not in said
    kept = [Chat.of(("user", "Hi"), ("assistant", text)) for text in ("Hello.", "Bye.")]
    assert list(open_documents(DataSpec(name, skip_bad_lines=1))) == kept
    assert len(caplog.messages) == 1


@everywhere
def test_empty_fields_for_functions_change_no_chat(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables have every column in every row."""
    message = {**ANSWERED, "tool_calls": None, "function_call": None}
    rows = [{"messages": [ASKED, message], "tools": value} for value in (None, [])]
    name = written(rows, place, tmp_path, monkeypatch)
    assert list(open_documents(DataSpec(name))) == [Chat.of(("user", "Hi"), ("assistant", "Hello."))] * 2


def test_parts_of_text_are_joined_and_others_are_refused_beside_calls_too(tmp_path: Path) -> None:
    path, parts = tmp_path / "a.jsonl", [{"type": "text", "text": text} for text in ("Hel", "lo.")]
    for fields in ({}, {"tool_calls": CALLS}):
        path.write_text(json.dumps(answer(content=parts, **fields)), encoding="utf-8")
        (chat,) = open_documents(DataSpec(str(path)))
        assert isinstance(chat, Chat)
        assert chat.messages[1]["content"] == "Hello."
        path.write_text(json.dumps(answer(content=[*parts, {"type": "image_url"}], **fields)), encoding="utf-8")
        with pytest.raises(DataError, match='the "content" of message 2 of line 1 must be a text'):
            list(open_documents(DataSpec(str(path))))


@everywhere
def test_the_developer_is_the_system_and_parameters_may_be_json_text(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": '{"type": "object"}'}}
    rows: list[dict[str, object]] = [
        {"messages": [{"role": "developer", "content": "Be kind."}, ASKED, ANSWERED], "tools": [tool]}
    ]
    (chat,) = open_documents(DataSpec(written(rows, place, tmp_path, monkeypatch)))
    assert isinstance(chat, Chat)
    assert chat.messages[0] == {"role": "system", "content": "Be kind."}
    assert chat.tools[0]["function"]["parameters"] == {"type": "object"}


@everywhere
@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, ANSWERED]},
        {"prompt": "Hi", "completion": "Hello."},
        {"instruction": "Hi", "input": "", "output": "Hello."},
    ],
    ids=lambda record: next(iter(record)),
)
def test_a_chat_that_is_there_as_a_text_as_well_is_a_chat(
    record: dict[str, object], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alpaca's data has such a column, in which the question would be learned, too."""
    name = written([{**record, "text": "Below is Hi", "other": "own"}], place, tmp_path, monkeypatch)
    assert list(open_documents(DataSpec(name))) == [Chat.of(("user", "Hi"), ("assistant", "Hello."))]
    assert list(open_documents(DataSpec(name, text_field="other"))) == ["own"]


@everywhere
def test_a_text_with_a_prompt_is_a_text(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = written([{"text": "Whole.", "prompt": "Write."}], place, tmp_path, monkeypatch)
    assert list(open_documents(DataSpec(name))) == ["Whole."]


def test_a_greeting_is_only_read(tokenizer: PreTrainedTokenizerFast) -> None:
    """No prompt asks for it."""
    greeted = Chat.of(("assistant", "Welcome."), ("user", "Hi"), ("assistant", "Hello."))
    ids = Encoder(tokenizer).encode([greeted])[0]
    assert "Welcome." in text_of(tokenizer, ~ids[ids < 0])
    assert text_of(tokenizer, ids[ids >= 0]) == "Hello.<|im_end|>\n"
    alone = dataclasses.replace(Chat.of(("assistant", "Welcome.")), place="a.jsonl: line 1")
    with pytest.raises(DataError, match=r"--data a\.jsonl: line 1: a chat has no answer to learn"):
        Encoder(tokenizer).encode([alone])


CALLED = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "1", "content": "8 am"},
        {"role": "assistant", "content": "It is 8."},
    ],
    "tools": [TOOL],
}


@pytest.mark.parametrize("kind", ["text", "call"])
def test_an_answer_of_weight_0_is_read_and_not_learned(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """OpenAI's field for earlier turns."""
    earlier = ANSWERED if kind == "text" else {"role": "assistant", "content": None, "tool_calls": CALLS}
    last = {"role": "assistant", "content": "Ciao", "weight": 1}
    chat = read_one({"messages": [ASKED, {**earlier, "weight": 0}, ASKED, last]}, tmp_path)
    whole, answers = learned(tokenizer, chat)
    assert answers == "Ciao<|im_end|>\n"
    assert ("Hello." if kind == "text" else "<tool_call>") in whole
    assert read_one(json.loads(chat.to_json()), tmp_path) == chat


NATIVE_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}<call>{{ call.function.name }}|{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template with functions of its own format."""


def read_one(record: dict[str, object], folder: Path) -> Chat:
    path = folder / "one.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    (document,) = open_documents(DataSpec(str(path)))
    assert isinstance(document, Chat)
    return document


def learned(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> tuple[str, str]:
    """Return the whole text of an encoded chat, and its learned part."""
    ids = Encoder(tokenizer).encode([chat])[0]
    return text_of(tokenizer, np.where(ids < 0, ~ids, ids)), text_of(tokenizer, ids[ids >= 0])


def test_calls_are_learned_as_text_where_the_template_has_no_functions(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole, answers = learned(tokenizer, read_one(CALLED, tmp_path))
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert answers == f"{call}<|im_end|>\nIt is 8.<|im_end|>\n"
    assert "Be brief." in whole
    assert '{"name": "now", "description": "The time."}' in whole
    assert "<tool_response>\n8 am\n</tool_response>" in whole


def test_calls_are_learned_in_the_format_of_the_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, NATIVE_TEMPLATE
    try:
        whole, answers = learned(tokenizer, read_one(CALLED, tmp_path))
    finally:
        tokenizer.chat_template = template
    assert answers == "<call>now|{}</call><|im_end|>\nIt is 8.<|im_end|>\n"
    assert whole.startswith('<|im_start|>tools\n[{"type": "function", "function": {"name": "now"')


def test_a_model_trained_on_its_functions_reads_only_the_request(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    template = tokenizer.chat_template
    tokenizer.chat_template = ChatFormat.of_tokenizer(tokenizer).knowing_functions().template  # type: ignore[union-attr]
    try:
        whole, answers = learned(tokenizer, read_one(CALLED, tmp_path))
        assert tool_format(tokenizer.chat_template, "", "").is_learned
    finally:
        tokenizer.chat_template = template
    assert answers == '{"name": "now", "arguments": {}}<|im_end|>\nIt is 8.<|im_end|>\n'
    assert "Be brief." in whole
    assert "The time." not in whole


def test_a_long_system_message_of_the_template_becomes_an_empty_one() -> None:
    talkative = (
        "{% if messages[0]['role'] != 'system' %}<system>You are a helpful assistant.</system>{% endif %}"
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    format = ChatFormat.of(talkative, "", "")
    assert format is not None
    question = [{"role": "user", "content": "Hi"}]
    assert format.knowing_functions().prompt(question) == "<system></system><user>Hi</user><assistant>"
    told = [{"role": "system", "content": "Be brief."}, *question]
    assert format.knowing_functions().prompt(told) == "<system>Be brief.</system><user>Hi</user><assistant>"


def test_a_trained_prompt_is_the_served_one(tokenizer: PreTrainedTokenizerFast, artefact: Path, tmp_path: Path) -> None:
    chat = read_one({**CALLED, "messages": CALLED["messages"][:3]}, tmp_path)  # type: ignore[index]
    ids = Encoder(tokenizer).encode([chat])[0]
    prompt = [int(~each) for each in ids if each < 0]
    with contextlib.closing(load_engine(artefact, EngineOptions(threads=1))) as engine:
        served = tool_prompt(engine, chat.messages[:2], ToolUse(chat.tools)).tokens
    assert prompt == served


FORMS = {
    "prompt and completion": {"prompt": "Hi", "completion": "Hello."},
    "prompt and completion as messages": {"prompt": [ASKED], "completion": [ANSWERED]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "openai": {"messages": [ASKED, ANSWERED]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_record_is_the_same_chat(form: str, tmp_path: Path) -> None:
    assert read_one(FORMS[form], tmp_path) == Chat.of(("user", "Hi"), ("assistant", "Hello."))


def test_an_input_follows_its_instruction(tmp_path: Path) -> None:
    chat = read_one({"instruction": "Translate.", "input": "Hallo", "output": "Hello"}, tmp_path)
    assert chat == Chat.of(("user", "Translate.\n\nHallo"), ("assistant", "Hello"))


def test_sharegpt_calls_and_results_are_calls_and_results(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "now", "arguments": {}}'},
        {"from": "observation", "value": "8 am"},
        {"from": "gpt", "value": "It is 8."},
    ]
    record = {"conversations": turns, "system": "Be brief.", "tools": json.dumps([TOOL])}
    assert read_one(record, tmp_path) == read_one(CALLED, tmp_path)


def test_prompts_and_completions_are_read_from_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nHi,Hello.\n", encoding="utf-8")
    assert list(open_documents(DataSpec(str(tmp_path / "a.csv")))) == [Chat.of(("user", "Hi"), ("assistant", "Hello."))]
    for table in ({"instruction": ["Hi"], "output": ["Hello."]}, {"prompt": ["Hi"], "completion": ["Hello."]}):
        parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
        found = list(open_documents(DataSpec(str(tmp_path / "a.parquet"))))
        assert found == [Chat.of(("user", "Hi"), ("assistant", "Hello."))]


@pytest.mark.parametrize("place", ["row", "hub row"])
def test_functions_of_a_table_do_not_get_the_arguments_of_others(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of Arrow has the fields of all of its objects, null where a row has none."""
    rows = []
    for name, argument in (("dim", "level"), ("play", "song")):
        parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
        call = {"function": {"name": name, "arguments": {argument: "7"}}}
        tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
        rows.append(
            {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [tool]}
        )
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist() != rows
    expected = [read_one(row, tmp_path) for row in rows]
    if place == "row":
        parquet.write_table(table, tmp_path / "a.parquet")
        found = list(open_documents(DataSpec(str(tmp_path / "a.parquet"))))
    else:
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: table.to_pylist())
        found = list(open_documents(DataSpec("owner/name")))
    assert found == expected


def test_two_jobs_are_mixed_by_their_weights(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Chats of one file and calls of another, each whole in its window."""
    call = {"role": "assistant", "content": None, "tool_calls": CALLS}
    calls = [{"messages": [{"role": "user", "content": f"Time {n}?"}, call], "tools": [TOOL]} for n in range(60)]
    texts = [{"prompt": f"Say {n}", "completion": "hello"} for n in range(60)]
    paths = [tmp_path / "calls.jsonl", tmp_path / "texts.csv"]
    paths[0].write_text("\n".join(map(json.dumps, calls)), encoding="utf-8")
    paths[1].write_text("prompt,completion\n" + "\n".join(",".join(each.values()) for each in texts), encoding="utf-8")
    specs = [DataSpec.parse(f"{path}:{weight}") for path, weight in zip(paths, (0.7, 0.3), strict=True)]
    stream = PackedStream(specs, tokenizer, 600, 0.05, seed=0)
    stream.check()
    assert stream.has_chats
    answers = [text_of(tokenizer, window[window >= 0]) for window in stream.next_windows(50)]
    has_call, has_text = (sum(part in answer for answer in answers) for part in ("<tool_call>", "hello"))
    assert (has_call, has_text) == (35, 15)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": "hello"}, "must be a list of"),
        ({"messages": [{"role": "user"}]}, 'message 1 of line 1 must be {"role": ..., "content": ...}'),
        ({"messages": [ASKED]}, "no message has the role assistant"),
        ({"messages": [{**ANSWERED, "weight": 0}]}, "no message has the role assistant and a weight of 1"),
        ({"messages": [{**ANSWERED, "content": "\ud800"}]}, "not Unicode"),
        ({"prompt": "Hi"}, 'has a "prompt" without a "completion"'),
        ({"instruction": "Hi"}, 'has an "instruction" without an "output"'),
        ({"conversations": [{"from": ["dog"], "value": "Wau"}]}, "has a turn \"from\" ['dog']; known are"),
        (
            {"instruction": "Add.", "input": [1, 2], "output": "3"},
            'the "instruction" and the "input" of line 1 must be',
        ),
        ({"messages": [ASKED, ANSWERED], "tools": [{"name": "f", "description": "\ud800"}]}, "line 1 is not Unicode"),
        ({"messages": [ASKED, ANSWERED], "tools": [{"name": "a b"}]}, "line 1 has a function 'a b'; use at most 128"),
        ({"messages": [ASKED, ANSWERED], "tools": [TOOL, TOOL]}, "line 1 has two functions now; rename one"),
        ({"conversations": [{"from": "dog", "value": "Wau"}]}, "has a turn \"from\" 'dog'; known are"),
        ({"chosen": "a"}, 'has no field "text"'),
    ],
)
def test_a_record_that_is_not_understood_names_its_field(
    record: dict[str, object], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=re.escape(reason)):
        read_one(record, tmp_path)


def test_a_corpus_keeps_functions(tmp_path: Path) -> None:
    chat = read_one(CALLED, tmp_path)
    (tmp_path / "two.jsonl").write_text(chat.to_json(), encoding="utf-8")
    assert list(open_documents(DataSpec(str(tmp_path / "two.jsonl")))) == [chat]


def test_a_chat_is_never_cut_by_a_window(tokenizer: PreTrainedTokenizerFast, chats: Path) -> None:
    """The rest of an answer without its request would teach the model to make things up."""
    stream = PackedStream([DataSpec(str(chats))], tokenizer, 60, 0.05, seed=0)
    windows = stream.next_windows(100)
    assert {text_of(tokenizer, ~window[:1]) for window in windows} == {"<|im_start|>"}
    learned = [window[window >= 0] for window in windows]
    texts = [text_of(tokenizer, window) for window in learned if len(window)]
    assert len(texts) > 90
    for text in texts:
        assert re.fullmatch(r"(It is \d+\.<\|im_end\|>\n)+", text), text


@pytest.fixture
def unequal_chats(tmp_path: Path) -> Path:
    """300 chats of 23 to 210 tokens, each with its number in the answer."""
    path, repeats = tmp_path / "unequal.jsonl", np.random.default_rng(0).integers(0, 60, 300)
    records = [{"prompt": "What" + " is" * count, "completion": f"#{at}."} for at, count in enumerate(repeats.tolist())]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def numbers_in(tokenizer: PreTrainedTokenizerFast, windows: np.ndarray) -> list[int]:
    """The chats of `unequal_chats` in windows, in their order."""
    learned = "".join(text_of(tokenizer, window[window >= 0]) for window in windows)
    return [int(each) for each in re.findall(r"#(\d+)\.", learned)]


def test_waiting_chats_fill_windows_and_none_is_lost(tokenizer: PreTrainedTokenizerFast, unequal_chats: Path) -> None:
    spec = DataSpec(str(unequal_chats))
    stream = PackedStream([spec], tokenizer, 256, 0.05, seed=0)
    kept = [at for at, each in enumerate(open_documents(spec)) if not is_held_out(each, 0.05)]
    documents = stream.encoder.encode([each for each in open_documents(spec) if not is_held_out(each, 0.05)])
    windows = stream.next_windows(sum(map(len, documents)) // 256)
    found = numbers_in(tokenizer, windows)
    assert len(set(found)) == len(found) > 0.93 * len(kept)  # first come, first served takes 0.86
    # a chat waits until the next window at the latest, so the windows that end the epoch hold the others
    found += numbers_in(tokenizer, stream.next_windows(40))
    assert sorted(found[: len(kept)]) == kept


@pytest.mark.parametrize("taken", [1, 7, 95])
def test_windows_of_waiting_chats_resume_where_they_stopped(
    taken: int, tokenizer: PreTrainedTokenizerFast, unequal_chats: Path
) -> None:
    stream, other = (PackedStream([DataSpec(str(unequal_chats))], tokenizer, 256, 0.05, seed=0) for _ in range(2))
    stream.next_windows(taken)
    other.load_state(as_arrays(as_tensors(stream.state())))
    assert np.array_equal(stream.next_windows(150), other.next_windows(150))


def test_run_counts_padding_among_the_tokens_that_it_reads(
    tokenizer: PreTrainedTokenizerFast, unequal_chats: Path
) -> None:
    """A window has room for one of these chats, and none fills its rest."""
    chats = [line for line in unequal_chats.read_text(encoding="utf-8").splitlines() if line.count(" is") > 42]
    unequal_chats.write_text("\n".join(chats), encoding="utf-8")
    text = RunText([DataSpec(str(unequal_chats))], tokenizer, SourceConfig(sequence_length=128), 0, 1)
    (line,) = text.reading_lines(128 * 60)
    assert len(numbers_in(tokenizer, text.stream.next_windows(60))) == 60
    found = re.search(r"about (\d+) of", line)
    assert found is not None, line
    assert 57 <= int(found[1]) <= 63, line  # without padding, 92 of 101


def test_another_vocabulary_loses_no_waiting_chat(tokenizer: PreTrainedTokenizerFast, unequal_chats: Path) -> None:
    spec = DataSpec(str(unequal_chats))
    stream = PackedStream([spec], tokenizer, 256, 0.05, seed=0)
    kept = {at for at, each in enumerate(open_documents(spec)) if not is_held_out(each, 0.05)}
    before = numbers_in(tokenizer, stream.next_windows(20))
    assert any(not len(each) for each in stream.corpora[0]._queue)  # some were taken before their turn
    stream.switch_tokenizer(tokenizer)
    after = numbers_in(tokenizer, stream.next_windows(120))
    assert kept <= {*before, *after[: len(kept)]}


def test_a_source_without_a_template_neither_learns_nor_holds_chats(tokenizer: PreTrainedTokenizerFast) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(DataError, match="no chat template"):
            Encoder(tokenizer).encode([CHAT])
        with pytest.raises(UsageError, match="no chat template"):
            list(sample_chats(tiny_model(tiny_architecture()), tokenizer, 100, seed=0))
    finally:
        tokenizer.chat_template = template


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}|{% endfor %}"
    found = ChatFormat(template, "", "", "|")
    with pytest.raises(DataError, match="rewrites earlier turns"):
        found.spans(CHAT)


def test_a_run_mixes_chats_with_text(source_folder: Path, corpus: Path, chats: Path, tmp_path: Path) -> None:
    arguments = command(source_folder, corpus, tmp_path / "run", "--data", f"{chats}:0.5", "--distill", "1")
    assert run(arguments) == 0
    losses = [record["loss"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert len(losses) == 20
    assert all(np.isfinite(losses))


def test_held_out_perplexity_equals_that_of_predicted_tokens(
    source_folder: Path, corpus: Path, chats: Path, tmp_path: Path
) -> None:
    """However windows come together in batches, and whatever of them is only read."""
    found = set()
    for batch_size in ("1", "8"):
        output = tmp_path / batch_size
        arguments = command(source_folder, corpus, output, "--data", str(chats))
        assert run([*arguments, "--batch-size", batch_size, "--tokens", "256"]) == 0
        found.add(round(metrics(output)[0]["perplexity_source"], 3))
    assert len(found) == 1
    assert found.pop() > 100  # of a random model of 400 tokens


def test_steps_without_an_answer_change_nothing(
    source_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Most questions are longer than a window: many steps have nothing to learn, and say nothing of any group."""
    path = tmp_path / "long.jsonl"
    lines = []
    for index in range(200):
        question = {"role": "user", "content": f"What is {index}? " * (1 if index % 5 == 0 else 20)}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": f"It is {index}."}]}))
    path.write_text("\n".join(lines), encoding="utf-8")
    arguments = command(source_folder, path, tmp_path / "run", "--batch-size", "1")
    assert run([*arguments, "--prune-start", "0", "--prune-end", "0"]) == 0
    records = [record for record in metrics(tmp_path / "run") if "loss" in record]
    empty = [record for record in records if record.get("nothing_to_learn")]
    assert 0 < len(empty) < len(records)
    assert not any(record.get("removed") for record in empty)
    assert any(record.get("removed") for record in records)
    assert "contain no tokens to learn; such steps are skipped" in capsys.readouterr().out


def test_text_without_chats_is_warned_of(
    source_folder: Path, corpus: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(source_folder, corpus, tmp_path / "text")) == 0
    assert "may forget to end its turns" in capsys.readouterr().out
    assert run(command(source_folder, corpus, tmp_path / "both", "--data", f"{chats}:0.5")) == 0
    assert "may forget to end its turns" not in capsys.readouterr().out


def test_a_model_chats_with_itself_the_same_for_a_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tiny_architecture())
    with torch.no_grad():  # an untrained model ends no turn by itself: make the end of a turn likely
        model.lm_head.weight[tokenizer.eos_token_id] += 4 * model.lm_head.weight.std()
    before = [parameter.clone() for parameter in model.parameters()]
    first = list(sample_chats(model, tokenizer, 200, seed=1))
    assert first == list(sample_chats(model, tokenizer, 200, seed=1))
    assert first != list(sample_chats(model, tokenizer, 200, seed=2))
    assert all([message["role"] for message in chat.messages] == ["user", "assistant"] for chat in first)
    questions = [chat.messages[0]["content"] for chat in first]
    assert len(set(questions)) == len(questions)
    begun = [question.startswith(OPENINGS) for question in questions]
    assert any(begun)
    assert not all(begun)
    assert all(message["content"].strip() for chat in first for message in chat.messages)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
