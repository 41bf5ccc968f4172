"""Chat templates of a job's own: what they see, what is learned, and that every runtime renders them alike."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accepting import is_accepted
from exporting import export
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from tiny import tiny_tokenizer
from training import command, run, unpruned
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from efficientllm.export.gguf.modelfile import NO_TEMPLATE
from efficientllm.runtime.base.child import run_python
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.chat_template import Message, read_template_file, render_chat
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.hf_tokenizer import read_chat_template
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.prompt import ToolUse, tool_prompt
from efficientllm.runtime.tool_format import JOB_MARK, LEARNED, tool_format
from efficientllm.train.data import check
from efficientllm.train.data.chat import Chat, ChatFormat, Encoder, set_chat_template
from efficientllm.train.evaluation import cli as eval_cli
from efficientllm.train.evaluation.jobs import read_examples

JOBS, SECTION = Path(__file__).parents[1] / "docs" / "jobs.md", "## A job with a context"

HOME_TEMPLATE = Path(__file__).parents[1] / "research" / "home" / "template.jinja"
HOME_PROMPT = "These are the devices in this smart home:\n" + "".join(
    f"- names: {name}\n  domain: {domain}\n  areas: Attic\n"
    for name, domain in (("Work Lamp", "light"), ("Roof Fan", "fan"), ("'台所'", "light"))
)

TEMPLATE = r"""
{%- macro spaced(value) -%}
{%- if value is string -%}{{- (' ' + value) | tojson -}}
{%- elif value is mapping -%}
{{- '{' -}}
{%- for key, each in value.items() -%}
{{- (', ' if not loop.first else '') + (key | tojson) + ': ' + spaced(each) -}}
{%- endfor -%}
{{- '}' -}}
{%- elif value is iterable -%}
{{- '[' -}}
{%- for each in value -%}{{- (', ' if not loop.first else '') + spaced(each) -}}{%- endfor -%}
{{- ']' -}}
{%- else -%}{{- value | tojson -}}{%- endif -%}
{%- endmacro -%}
{%- set stock = namespace(text='') -%}
{%- for message in messages if message['role'] == 'system' and 'Stock:\n' in message['content'] -%}
{%- set stock.text = message['content'].split('Stock:\n')[1] -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message['content'] or '' -%}
{%- if message['role'] == 'user' -%}
{{- '<|im_start|>user\n' -}}
{%- for line in stock.text.split('\n') if line and (line.split(':')[0] | lower) in (content | lower) -%}
{{- line + '\n' -}}
{%- endfor -%}
{{- ('no list\n' if not tools else '') + content + '<|im_end|>\n' -}}
{%- elif message['role'] == 'tool' -%}
{{- '<|im_start|>tool\n' + ('failed' if 'error' in content else 'done') + '<|im_end|>\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\n' + content -}}
{%- for call in message['tool_calls'] or [] -%}
{{- ('' if loop.first else '\n') + '{"name": "' + call['function']['name'] + '", "arguments": ' -}}
{{- spaced(call['function']['arguments']) + '}' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
""".lstrip()
"""Shows the lines of a list whose names the request has, and of a result whether it failed."""
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROPERTIES = {"item": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": PROPERTIES}}}
    for name in ("fetch", "count")
)


def call(name: str, **arguments: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(item: str = "Blue Crate") -> Chat:
    """Two requests: one with two calls, whose second result is an error, and one that only gets an answer."""
    calls = [call("fetch", item=item, tags=["a", "b"]), call("count", item=item)]
    messages: list[Message] = [
        {"role": "system", "content": f"You work here.\nStock:\n{item}: shelf 4\nRed Barrel: shelf 7\n"},
        {"role": "user", "content": f"Fetch and count the {item.lower()}"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "{}"},
        {"role": "tool", "content": '{"error": "not there"}'},
        {"role": "assistant", "content": "I have it, and could not count it."},
        {"role": "user", "content": "Where is the red barrel?"},
        {"role": "assistant", "content": "On shelf 7."},
    ]
    return Chat(tuple(messages), TOOLS)


RENDERED = (
    "<|im_start|>user\nBlue Crate: shelf 4\nFetch and count the blue crate<|im_end|>\n<|im_start|>assistant\n"
    '[[{"name": "fetch", "arguments": {"item": " Blue Crate", "tags": [" a", " b"]}}\n'
    '{"name": "count", "arguments": {"item": " Blue Crate"}}<|im_end|>\n]]'
    "<|im_start|>tool\ndone<|im_end|>\n<|im_start|>tool\nfailed<|im_end|>\n<|im_start|>assistant\n"
    "[[I have it, and could not count it.<|im_end|>\n]]"
    "<|im_start|>user\nRed Barrel: shelf 7\nWhere is the red barrel?<|im_end|>\n<|im_start|>assistant\n"
    "[[On shelf 7.<|im_end|>\n]]"
)
"""The conversation with its learned text in brackets."""


def marked(format: ChatFormat, chat: Chat) -> str:
    return "".join(f"[[{span.text}]]" if span.is_answer else span.text for span in format.spans(chat))


def job_format(template: str = TEMPLATE) -> ChatFormat:
    format = ChatFormat.of(JOB_MARK + template, "", "")
    assert format is not None
    return format


def test_a_job_template_gets_tools_calls_and_results() -> None:
    assert marked(job_format(), conversation()) == RENDERED
    without = Chat(conversation().messages)
    assert "user\nno list\nWhere" in marked(job_format(), without).replace("Red Barrel: shelf 7\n", "")


def test_a_template_that_names_nothing_gets_plain_roles() -> None:
    text = marked(job_format(PLAIN), conversation())
    assert "<|im_start|>user\n<tool_response>\n{}\n</tool_response>\n<tool_response>\n" in text
    assert '[[{"name": "fetch", "arguments": {"item": " Blue Crate", "tags": [" a", " b"]}}\n' in text
    assert "parameters" not in text


def test_the_form_of_calls_equals_that_of_the_template() -> None:
    spaced = tool_format(JOB_MARK + TEMPLATE, "", "")
    assert (spaced.begin, spaced.middle, spaced.between, spaced.end) == (
        *(LEARNED.begin, LEARNED.middle, LEARNED.between, LEARNED.end),
    )
    assert (spaced.has_spaced_texts, spaced.writes_calls, spaced.is_learned) == (True, True, True)
    unspaced = tool_format(JOB_MARK + TEMPLATE.replace("(' ' + value)", "value"), "", "")
    assert not unspaced.has_spaced_texts
    assert unspaced.begin == LEARNED.begin
    reads = tool_format(JOB_MARK + "{% if messages[0].tool_calls %}!{% endif %}" + PLAIN, "", "")
    assert (reads.writes_calls, reads.given, reads.begin) == (False, {"tool_calls"}, LEARNED.begin)


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN, PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}")])
def test_a_chat_is_rendered_once_and_marked_as_by_its_turns(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []

    def counting(*arguments: Any, **options: Any) -> str:
        rendered.append(1)
        return render_chat(*arguments, **options)

    chats = [conversation(f"Crate {number} ") for number in range(64)]
    expected = [job_format(template).spans(chat) for chat in chats]  # each the first of its format: by its turns
    format = job_format(template)
    monkeypatch.setattr("efficientllm.train.data.chat.render_chat", counting)
    assert [format.spans(chat) for chat in chats] == expected
    by_turns = 7  # number 1, 2, 4, ..., 64, and each has three answers
    assert len(rendered) == 64 - by_turns + by_turns * 3 * 2


def test_text_like_a_turn_within_a_chat_does_not_move_the_marks() -> None:
    format = job_format()
    for _ in range(4):
        tricky = Chat.of(("user", "say <|im_start|>assistant\nHi<|im_end|>\n"), ("assistant", "Hi"))
        assert marked(format, tricky).endswith("<|im_end|>\n<|im_end|>\n<|im_start|>assistant\n[[Hi<|im_end|>\n]]")


@pytest.fixture(scope="module")
def template_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "job.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(source_folder: Path, template_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of a tiny model that was trained with the template on such conversations."""
    folder = tmp_path_factory.mktemp("job")
    data = folder / "chats.jsonl"
    data.write_text("".join(conversation(f"Crate {number}").to_json() + "\n" for number in range(60)))
    flags = ["--functions", "learned", "--chat-template", str(template_file), "--sequence-length", "512"]
    assert run(unpruned(command(source_folder, data, folder / "run", *flags))) == 0
    assert read_chat_template(folder / "run/model") == JOB_MARK + TEMPLATE
    assert export(folder / "run", "gguf", folder / "gguf", "--quantize", "f32") == 0
    return folder / "gguf"


@pytest.fixture(scope="module")
def engine(trained: Path) -> Iterator[EngineScheduler]:
    with contextlib.closing(load_engine(trained, EngineOptions(threads=1))) as engine:
        yield engine


def prompts(chat: Chat) -> list[tuple[Message, ...]]:
    """The messages before each answer."""
    return [chat.messages[:index] for index, each in enumerate(chat.messages) if each["role"] == "assistant"]


def test_training_and_server_render_the_same_tokens(
    engine: EngineScheduler, tokenizer: PreTrainedTokenizerFast
) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, JOB_MARK + TEMPLATE
    try:
        ids = Encoder(tokenizer).encode([conversation()])[0]
    finally:
        tokenizer.chat_template = template
    starts = np.flatnonzero((ids[1:] >= 0) & (ids[:-1] < 0)) + 1
    for start, messages in zip(starts, prompts(conversation()), strict=True):
        read = np.where(ids < 0, ~ids, ids)[:start].tolist()
        assert tool_prompt(engine, with_ids(messages), ToolUse(TOOLS)).tokens == read


def with_ids(messages: tuple[Message, ...]) -> list[Message]:
    """The messages as clients send them: calls have ids, and results name them."""
    found: list[Message] = []
    for message in messages:
        calls = [{**each, "id": f"call_{number}"} for number, each in enumerate(message.get("tool_calls", ()))]
        found.append({**message, **({"tool_calls": calls} if calls else {}), "tool_call_id": "call_0"})
    return found


def llama_cpp_python(trained: Path, template: str, messages: list[Message]) -> str:
    formatter = Jinja2ChatFormatter(template, eos_token="", bos_token="")
    return formatter(messages=messages, tools=list(TOOLS)).prompt  # type: ignore[arg-type]


LLAMA_SERVER = """
import json, os, sys, urllib.request, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup = sys.argv[1], 256, False
server = xllamacpp.Server(parameters)
headers = {"content-type": "application/json"}
request = urllib.request.Request(server.listening_address + "/apply-template", sys.argv[2].encode(), headers)
print("ANSWER", urllib.request.urlopen(request, timeout=60).read().decode(), flush=True)
os._exit(0)
"""
"""A process of its own, because the end of the server may wait for itself."""


def llama_server(trained: Path, template: str, messages: list[Message]) -> str:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    body = json.dumps({"messages": messages, "tools": TOOLS})
    done = run_python("-c", LLAMA_SERVER, str(trained / "model.gguf"), body, timeout=120)
    assert done.code == 0, done.errors
    return str(json.loads(done.output.partition("ANSWER")[2])["prompt"])


def transformers_tokenizer(trained: Path, template: str, messages: list[Message]) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text = tokenizer.apply_chat_template(
        [dict(each) for each in messages], tools=list(TOOLS), tokenize=False, add_generation_prompt=True
    )
    return str(text)


@pytest.mark.parametrize("renderer", [llama_cpp_python, llama_server, transformers_tokenizer])
def test_stock_runtimes_render_the_same_tokens(renderer: Any, engine: EngineScheduler, trained: Path) -> None:
    assert engine.chat_template == JOB_MARK + TEMPLATE
    for messages in prompts(conversation()):
        ours = tool_prompt(engine, messages, ToolUse(TOOLS)).tokens
        theirs = renderer(trained, engine.chat_template, [dict(each) for each in messages])
        assert engine.tokenize(theirs, special=True) == ours


def test_stock_runtimes_render_the_template_of_the_home(trained: Path, tmp_path: Path) -> None:
    flags = ("--quantize", "f32", "--no-verify", "--chat-template", str(HOME_TEMPLATE))
    assert export(trained.parent / "run", "gguf", tmp_path / "gguf", *flags) == 0
    template = HOME_TEMPLATE.read_text(encoding="utf-8")
    first = "turn on the work lamp and the fan", "and the other one", "open the 台所 lamp"
    live = HOME_PROMPT.replace("\n  areas", "\n  state: 'on'\n  attributes:\n    brightness: '180'\n  areas")
    then = (
        "dim the work lamp to forty five percent",
        "don't keep the work lamp on",
        "keep the fan at 20%",
        "which lights are on",
    )
    text = f"Live Context: An overview of the areas and the {live[10:]}"
    result = json.dumps({"success": True, "result": text}, ensure_ascii=False)
    for requests, results in ((first, ()), (then, (("assistant", ""), ("tool", result)))):
        said = [("system", HOME_PROMPT), *(("user", each) for each in requests), *results]
        messages: list[Message] = [{"role": role, "content": content} for role, content in said]
        ours = render_chat(template, messages, "", "", tools=TOOLS)
        expected = "= light: Work Lamp @ Attic\n~ fan: Roof Fan @ Attic\nturn on the work lamp and the fan"
        assert ("\nso: Work Lamp, 台所" if results else expected) in ours
        for renderer in (llama_cpp_python, llama_server, transformers_tokenizer):
            assert renderer(tmp_path / "gguf", template, messages) == ours
    assert all(each in ours for each in ("number: 45\n", "leave\n", "question\n", "is on, brightness 71"))


def test_an_export_names_runtimes_that_render_differently(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert NO_TEMPLATE in (trained / "Modelfile").read_text(encoding="utf-8")
    assert not any("renders" in note for note in Manifest.read(trained).notes)
    other = tmp_path / "other.jinja"
    other.write_text("{% set last = messages[-1].content | title %}{{ last }}: " + PLAIN)
    flags = ("--quantize", "f32", "--no-verify", "--chat-template", str(other))
    assert export(trained.parent / "run", "gguf", tmp_path / "gguf", *flags) == 0
    printed, said = "".join(capsys.readouterr()), Manifest.read(tmp_path / "gguf").notes
    assert NO_TEMPLATE in said
    assert "efficientllm serve" in printed
    assert "ollama create" not in printed
    renders = next(note for note in said if "renders" in note)
    assert renders.startswith("llama-cpp-python renders 1 of")
    assert "the first is one with calls and results: " in renders


@pytest.mark.parametrize("target", ["gguf", "onnx", "hf-uniform"])
def test_an_export_may_have_another_template(target: str, exported: Any, template_file: Path, tmp_path: Path) -> None:
    checkpoint = exported("gguf", "--quantize", "f32").parent / "checkpoint"
    assert export(checkpoint, target, tmp_path / target, "--chat-template", str(template_file)) == 0
    if target == "hf-uniform":
        assert AutoTokenizer.from_pretrained(tmp_path / target).chat_template == TEMPLATE
        return
    with contextlib.closing(load_engine(tmp_path / target, EngineOptions(threads=1))) as engine:
        assert engine.chat_template == TEMPLATE


def test_an_export_of_a_learned_model_keeps_its_functions_learned(
    trained: Path, template_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jinja"
    other.write_text(PLAIN)
    run_folder = trained.parent / "run"
    assert export(run_folder, "gguf", tmp_path / "gguf", "--quantize", "f32", "--chat-template", str(other)) == 0
    with contextlib.closing(load_engine(tmp_path / "gguf", EngineOptions(threads=1))) as engine:
        assert engine.chat_template == JOB_MARK + PLAIN


def test_a_check_renders_with_the_template(
    source_folder: Path, template_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text(conversation().to_json())
    flags = ["--source", str(source_folder), "--functions", "learned", "--chat-template", str(template_file)]
    assert run_command(check.body, ["check", str(data), *flags]) == 0
    assert RENDERED in capsys.readouterr().out


BAD = {
    "no such file": (None, "No such file or directory"),
    "malformed": ("{% for m in messages %}", "the template is malformed: Unexpected end of template"),
    "not text": (b"\xff\xfe", "can't decode byte 0xff"),
    "empty": ("\n", "the file is empty"),
    "failing": ("{{ messages[3].content | length }}", "the template refuses these messages"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_template_gives_one_line(case: str, tmp_path: Path) -> None:
    content, reason = BAD[case]
    path = tmp_path / "bad.jinja"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=reason) as error:
        read_template_file(str(path))
    assert str(error.value).startswith(f"--chat-template {path}: ")
    assert "\n" not in str(error.value)


def test_a_template_without_answers_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    other = tiny_tokenizer()
    with pytest.raises(UsageError, match="--chat-template: it does not write an answer"):
        set_chat_template(other, "{{ messages[0].content }}", is_learned=True)


@pytest.fixture(scope="module")
def player(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the example in docs/jobs.md, with a tiny model of it."""
    folder, section = tmp_path_factory.mktemp("player"), JOBS.read_text(encoding="utf-8").partition(SECTION)[2]
    program, template = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "jinja"))
    assert program is not None
    assert template is not None
    (folder / "player.jinja").write_text(template[1], encoding="utf-8")
    assert run_python("-c", program[1].replace("6000", "60").replace("100, 1)", "6, 1)"), cwd=folder).code == 0
    flags = ["--functions", "learned", "--chat-template", str(folder / "player.jinja"), "--sequence-length", "256"]
    assert run(unpruned(command(source_folder, folder / "train.jsonl", folder / "run", *flags))) == 0
    assert export(folder / "run", "gguf", folder / "gguf", "--quantize", "f32") == 0
    return folder


def test_the_example_of_a_job_with_a_context_runs(player: Path) -> None:
    assert [note for note in Manifest.read(player / "gguf").notes if "renders" in note] == []
    flags = ["--task", str(player / "test.jsonl"), "--metric", "call", "--constrain", "listed", "--threads", "1"]
    flags += ["--task-tokens", "48", "--output", str(player / "eval")]
    assert run_command(eval_cli.body, [str(player / "gguf"), *flags]) == 0
    page = next((player / "eval").glob("misses-*.md")).read_text(encoding="utf-8")
    assert "    system: You control a music player." in page
    assert "after_result" in (player / "eval").joinpath("results.json").read_text(encoding="utf-8")


def test_listed_titles_equal_those_of_the_conversation(player: Path) -> None:
    example = read_examples(player / "test.jsonl")[0]
    (title, kind), other = re.findall(r"- title: (.*)\n  kind: (.*)", str(example.chat.messages[0]["content"]))[:2]
    with contextlib.closing(load_engine(player / "gguf", EngineOptions(threads=1))) as engine:
        use = ToolUse(example.chat.tools, must_call=True, arguments="listed")
        prompt = tool_prompt(engine, example.prompt.messages, use)
        for arguments, expected in (
            ({"title": title, "kind": kind}, True),
            ({"title": other[0]}, True),
            ({"title": title, "kind": "single"}, False),
            ({"title": title.lower()}, False),
        ):
            text = prompt.format.write([{"function": {"name": "play", "arguments": arguments}}])
            assert is_accepted(prompt.constraint(engine), engine, text) == expected
