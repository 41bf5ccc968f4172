"""Requests as clients really send them, clients that leave, and models that are unloaded under load."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from serving import loaded_pool, serve, served
from starlette.responses import PlainTextResponse

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server import cli
from efficientllm.server.access.guard import Guard
from efficientllm.server.app import create_app
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.models.pool_options import PoolOptions
from efficientllm.server.options import AppOptions, ServeOptions
from efficientllm.server.web import WebServerOptions

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    with served(artefact, limits=PoolOptions(waiting=40), context=2048) as address:
        yield address


def post(address: str, path: str = "chat/completions", **body: Any) -> httpx.Response:
    messages = {} if path == "completions" else {"messages": MESSAGES}
    return httpx.post(f"{address}/v1/{path}", json={"model": "tiny", **messages, **body}, timeout=60)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 2}),
        ("completions", {"prompt": "Hi", "max_tokens": 2}),
        ("responses", {"input": "Hi", "max_output_tokens": 16}),
        ("embeddings", {"input": "Hi"}),
    ],
)
def test_a_request_without_model_is_for_the_only_one(address: str, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{address}/v1/{path}", json=body, timeout=60)
    assert (answer.status_code, answer.json()["model"]) == (200, "tiny")


NULLS = ["top_p", "top_k", "min_p", "repetition_penalty", "n", "seed", "stop", "stream", "stream_options", "logit_bias"]
NULLS += ["logprobs", "top_logprobs", "response_format", "max_completion_tokens", "tools", "presence_penalty"]


def test_null_is_the_default(address: str) -> None:
    plain, nulls = post(address, **GREEDY), post(address, **dict.fromkeys(NULLS), **GREEDY)
    assert nulls.status_code == 200, nulls.text
    assert nulls.json()["choices"] == plain.json()["choices"]
    for path, more in (("chat/completions", {}), ("completions", {"prompt": "Hi"})):
        answer = post(address, path, temperature=None, max_tokens=None, seed=1, **more)
        assert answer.status_code == 200, answer.text
    streamed = post(address, **GREEDY, stream=True, stream_options={"include_usage": None})
    assert streamed.text.rstrip().endswith("data: [DONE]")
    assert post(address, messages=None).status_code == 400


def test_the_developer_is_the_system(address: str) -> None:
    answers = [
        post(address, messages=[{"role": role, "content": "Be brief."}, *MESSAGES], **GREEDY).json()
        for role in ("system", "developer", "user")
    ]
    assert answers[0]["choices"] == answers[1]["choices"]
    # "user" has another number of tokens than "system"; "developer" would have, too
    sizes = [answer["usage"]["prompt_tokens"] for answer in answers]
    assert sizes[0] == sizes[1] != sizes[2]


def test_server_passes_several_system_messages_to_the_template(address: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Hi"}, {"role": "system", "content": "Short."}, *MESSAGES]
    assert post(address, messages=messages, **GREEDY).status_code == 200


UNSERVED = {
    "suffix": ("x", "remove it"),
    "functions": ([{"name": "f"}], "use tools"),
    "best_of": (3, "remove it"),
    "store": (True, "remove it"),
    "guided_json": ({}, "use response_format with type json_schema"),
    "mirostat": (2, "remove it"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_nothing_that_would_change_the_answer_is_ignored(address: str, name: str) -> None:
    value, remedy = UNSERVED[name]
    for path, more in (("chat/completions", {}), ("completions", {"prompt": "Hi"})):
        answer = post(address, path, **{name: value}, **more)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == f"{name} is not served here; {remedy}"


def test_fields_without_effect_pass(address: str) -> None:
    neutral = {"tools": [], "tool_choice": "auto", "suffix": "", "logit_bias": {}, "store": False, "user": "me"}
    plain, answer = post(address, **GREEDY).json(), post(address, **neutral, **GREEDY).json()
    assert answer["choices"] == plain["choices"]


REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "chat/completions": [
        ({"tool_choice": "required"}, "tool_choice: required needs tools"),
        ({"tool_choice": {}, "tools": []}, "tool_choice.type: Field required"),
        ({"tools": [{"type": "function", "function": {"name": "f", "params": {"a": 1}}}]}, "params is not served"),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs"),
        ({"response_format": {"type": "regex"}}, "response_format: regex: is missing"),
        ({"response_format": {"type": "regex", "regex": "(a"}}, "regex: "),
        ({"response_format": {"type": "text", "regex": "z"}}, "response_format: regex: needs type regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_schema.schema: is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "json_schema: "),
        ({"response_format": {"type": "json_schema", "json_schema": {"scheme": {"a": 1}}}}, "scheme is not served"),
        ({"logit_bias": {"400": 1}}, "logit_bias: token 400 is outside the vocabulary of 400"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"٣": 1}}, "logit_bias.٣"),
        ({"logit_bias": {"01": 1}}, "must be the number of a token"),
        ({"frequency_penalty": 3}, "frequency_penalty: "),
        ({"messages": [{**MESSAGES[0], "contents": "x"}]}, "messages.0: contents is not served here"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, ""),
        ({"messages": [{"role": "user"}]}, ""),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}]}, ""),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, ""),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "context window"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"n": 0}, "n: "),
        ({"stream_options": {"usage": True}}, "stream_options: usage is not served here"),
        ({"stream_options": {"include_usage": True}}, "stream_options.include_usage: needs stream"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": "3"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
        ({"temperature": "0.5"}, "temperature: Input should be a valid number"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean"),
        ({"seed": 1e300}, "seed: Input should be less than 9223372036854776000"),
        ({"seed": 10**30}, "seed: Input should be less than 9223372036854776000"),
        ({"best_of": True}, "best_of is not served here"),
        ({"stop": ["x"] * 17}, "stop: List should have at most 16 items"),
        ({"stop": ["x", 1]}, "stop.1: Input should be a valid string"),
    ],
    "completions": [
        ({"prompt": []}, "at least 1 item"),
        ({"prompt": ["x"] * 17}, "has 17 texts; the limit is 16"),
        ({"prompt": ["a", None]}, "prompt.1: "),
    ],
    "responses": [
        ({"input": [item]}, said)
        for item, said in (
            ({"role": "user", "content": "x", "cache": 1}, "cache is not served here"),
            ({"role": "user", "content": 5}, "content"),
            ({"role": "user"}, "content: Field required"),
            ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "type: Input should be 'input_text'"),
            ({"type": "function_call", "call_id": "1", "name": "a b", "arguments": "{}"}, "name: String should match"),
            ({"type": "function_call", "call_id": "1", "name": "a", "arguments": "[]"}, "input: arguments of the call"),
            ({"type": "function_call_output", "call_id": "1", "output": 5}, "output: Input should be a valid string"),
            ({"type": "reasoning", "summary": []}, "input.0: the type of an item must be message, function_call or"),
        )
    ],
}
"""Path -> bodies that are refused, and parts of the messages."""


@pytest.mark.parametrize(("path", "body", "said"), [(path, *case) for path, cases in REFUSED.items() for case in cases])
def test_error_names_the_wrong_field(address: str, path: str, body: dict[str, Any], said: str) -> None:
    chat = {"messages": MESSAGES} if path == "chat/completions" else {}
    answer = post_path(address, f"/v1/{path}", **{"model": "tiny", **chat, **body})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert said in message
    assert "\n" not in message


def called(arguments: str) -> str:
    """A body in which the assistant has called a function."""
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    return json.dumps({"model": "tiny", "messages": [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]})


def with_fields(fields: str) -> str:
    return f'{{"model": "tiny", "messages": {json.dumps(MESSAGES)}, {fields}}}'


SCHEMA = '"response_format": {"type": "json_schema", "json_schema": {"schema": %s}}'
TOOL = '"tools": [{"type": "function", "function": {"name": "f", "description": "x", "parameters": %s}}]'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            with_fields('"max_tokens": ' + "9" * 5000),
            "the body cannot be read as JSON: Exceeds the limit (4300 digits)",
        ),
        (with_fields('"user": ' + "[" * 5000 + "]" * 5000), "the body cannot be read as JSON: it is nested too deeply"),
        (b'{"model": "\xff"}', "the body cannot be read as JSON: it is not UTF-8"),
        (b"", "the body is not a JSON object"),
        (b"[" * 100_000, "the body cannot be read as JSON: it is nested too deeply"),
        (with_fields('"temperature": NaN'), ""),
        ('{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', ""),
        (b"[]", "the body is not a JSON object"),
        (b'{"model": ', "the body is not JSON: "),
        (with_fields('"a\\nb": 1'), "a\\nb is not served here"),
        (
            with_fields(SCHEMA % '{"const": Infinity}'),
            "response_format.json_schema.schema: NaN and Infinity are not JSON",
        ),
        (with_fields(SCHEMA % '{"enum": [NaN]}'), "response_format.json_schema.schema: NaN and Infinity are not JSON"),
        (with_fields(TOOL % '{"description": "\\ud800"}'), "tools.0.function.parameters: text must not contain lone"),
        (called('{"a": "\\ud800"}'), "messages.1: arguments of the call of 'f': text must not contain lone"),
        (called('{"a": NaN}'), "messages.1: arguments of the call of 'f': NaN and Infinity are not JSON"),
        (called('{"a": %s}' % ("9" * 5000)), "messages.1: arguments of the call of 'f': Exceeds the limit"),
        (called('{"a": %s}' % ("[" * 5000 + "]" * 5000)), "messages.1: arguments of the call of 'f': are nested"),
        (with_fields('"chat_template_kwargs": {"messages": []}'), "chat_template_kwargs: messages is set by the other"),
        (with_fields('"chat_template_kwargs": {"add_generation_prompt": false}'), "chat_template_kwargs: add_gen"),
        (with_fields('"chat_template_kwargs": {"x": "\\ud800"}'), "chat_template_kwargs: text must not contain"),
    ],
)
def test_unreadable_body_gives_one_line_with_the_field(address: str, body: str | bytes, message: str) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert "\n" not in answer.json()["error"]["message"]


def test_server_accepts_template_settings_of_clients(address: str) -> None:
    said = {"add_generation_prompt": True, "continue_final_message": False, "self": 1, "enable_thinking": False}
    assert post(address, chat_template_kwargs=said, max_tokens=1).status_code == 200


def test_a_negative_seed_is_one_like_others(address: str) -> None:
    one, same, other = (
        post(address, seed=seed, temperature=1, max_tokens=8).json()["choices"][0]["message"]["content"]
        for seed in (-1, -1, -2)
    )
    assert one == same != other


def test_penalties_and_biases_change_the_answer(address: str) -> None:
    def content(**fields: Any) -> str:
        return post(address, temperature=0, max_tokens=12, **fields).json()["choices"][0]["message"]["content"]

    tokens = [post_path(address, "/tokenize", content=text).json()["tokens"][0] for text in "ab"]
    likely = {str(token): 60 for token in tokens}
    alone = content(logit_bias=likely)
    assert set(alone) <= {"a", "b"}
    assert set(content(logit_bias={**likely, str(tokens["ab".index(alone[0])]): -100})) == {"a", "b"} - {alone[0]}
    # what was said often is fined, so the other one gets its turn
    assert set(content(logit_bias=likely, frequency_penalty=2)) == {"a", "b"}


def post_path(address: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{address}{path}", json=body, timeout=60)


def test_tokens_go_forth_and_back(address: str) -> None:
    tokens = post_path(address, "/tokenize", model="tiny", content="Hello <|im_end|>").json()["tokens"]
    as_text = post_path(address, "/tokenize", content="Hello <|im_end|>", parse_special=False).json()["tokens"]
    assert tokens[-1] == 2
    assert len(as_text) > len(tokens)
    assert post_path(address, "/detokenize", tokens=as_text).json() == {"content": "Hello <|im_end|>"}
    assert post_path(address, "/detokenize", tokens=[400]).status_code == 400


def test_a_completion_may_begin_with_its_prompt_and_prompts_may_be_tokens(address: str) -> None:
    tokens = [post_path(address, "/tokenize", content=text).json()["tokens"] for text in ("One two", "Three")]
    settings: dict[str, Any] = {"prompt": tokens, "max_tokens": 4, "temperature": 0}
    plain, echoed = (post(address, "completions", **settings, echo=echo).json()["choices"] for echo in (False, True))
    assert [choice["text"] for choice in echoed] == [
        f"{prompt}{choice['text']}" for prompt, choice in zip(("One two", "Three"), plain, strict=True)
    ]
    stream = post(address, "completions", **settings, echo=True, stream=True).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    texts = ["".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == index) for index in (0, 1)]
    assert texts == [choice["text"] for choice in echoed]


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("path", "kind", "headers", "status"),
    [
        *(("/v1/chat/completions", kind, {}, 415) for kind in (FORM, "text/plain", "")),
        *(("/api/chat", kind, {}, 200) for kind in (FORM, "", "application/json; charset=utf-8")),
        ("/api/chat", "text/plain", {}, 415),
        *(("/api/chat", kind, {"Origin": "http://page.example"}, 415) for kind in (FORM, "")),
        *(("/api/chat", kind, {"Sec-Fetch-Site": "cross-site"}, 415) for kind in (FORM, "")),
    ],
)
def test_server_refuses_bodies_that_any_page_can_send(
    address: str, path: str, kind: str, headers: dict[str, str], status: int
) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "options": {"num_predict": 2}, "stream": False}
    content = json.dumps(body if path.startswith("/api") else {"model": "tiny", "messages": MESSAGES})
    sent = {"Content-Type": kind, **headers} if kind else headers
    answer = httpx.post(f"{address}{path}", content=content, headers=sent, timeout=60)
    assert answer.status_code == status
    assert status == 200 or "Content-Type: application/json" in answer.text


def raw(address: str, head: str, body: str = "") -> bytes:
    """Return the first line of the answer to a request that a client library would not send."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}\r\nHost: {host}\r\n\r\n{body}".encode())
        return connection.makefile("rb").readline()


def test_server_answers_path_in_absolute_form(address: str) -> None:
    assert b" 200 " in raw(address, f"GET {address}/v1/models HTTP/1.1")
    assert b" 404 " in raw(address, f"GET {address}/v1/nothing HTTP/1.1")


def test_server_refuses_body_with_two_lengths(address: str) -> None:
    lengths = "Content-Type: application/json\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"
    assert b" 400 " in raw(address, f"POST /tokenize HTTP/1.1\r\n{lengths}", "0\r\n\r\n")


def test_usage_counts_a_prompt_once_for_all_choices(address: str) -> None:
    text = "A sentence that no other test has asked for, so nothing of it is cached."
    one = post(address, "completions", prompt=text, max_tokens=2, temperature=0).json()["usage"]
    three = post(address, "completions", prompt=text, max_tokens=2, n=3, seed=1).json()["usage"]
    assert three["prompt_tokens"] == one["prompt_tokens"]
    assert three["total_tokens"] == three["prompt_tokens"] + three["completion_tokens"]
    assert one["prompt_tokens_details"]["cached_tokens"] < 3
    assert three["prompt_tokens_details"]["cached_tokens"] == one["prompt_tokens"] - 1
    two = post(address, "completions", prompt=[text, "Another"], n=2, max_tokens=2, seed=1).json()["usage"]
    assert one["prompt_tokens"] < two["prompt_tokens"] < 2 * one["prompt_tokens"]


ENDLESS = {"max_tokens": 1800, "temperature": 2, "seed": 3, "logit_bias": {"0": -100, "2": -100}}
"""Never <|endoftext|> or <|im_end|>."""


LONG = {"type": "object", "properties": {"text": {"type": "string", "minLength": 1500}}, "required": ["text"]}
LONG_OBJECT = {"type": "json_schema", "json_schema": {"name": "long", "schema": LONG}}


@pytest.mark.parametrize("body", [{}, {"n": 4}, {"response_format": LONG_OBJECT}, {"stop": ["never said"]}])
def test_disconnected_client_of_a_whole_answer_frees_its_place(address: str, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{address}/v1/chat/completions",
            json={"model": "tiny", "messages": MESSAGES, **ENDLESS, **body},
            timeout=httpx.Timeout(5, read=0.15),
        )
    until(lambda: httpx.get(f"{address}/health").json()["in_flight"] == 0)


def test_a_request_that_leaves_while_its_model_loads_keeps_no_place(artefact: Path) -> None:
    async def leave_early() -> None:
        pool = ModelPool(dict.fromkeys(("one", "two"), str(artefact)), EngineOptions(threads=1, context=64))
        entering = asyncio.ensure_future(pool.enter("two", pool.deadline()))
        await asyncio.sleep(0)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        while pool.in_flight or "two" not in pool.loaded:
            await asyncio.sleep(0.01)
        pool.close()

    asyncio.run(asyncio.wait_for(leave_early(), 20))


def test_port_in_use_gives_one_line(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run_command(cli.body, [str(artefact), "--port", str(port)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: --port {port}: another program listens on it at 127.0.0.1; choose another --port\n"
    with pytest.raises(UsageError, match=r"--host 192\.0\.2\.1 --port 8000: cannot listen"):
        cli.bind_socket("192.0.2.1", 8000)


@pytest.mark.parametrize("options", [ServeOptions, WebServerOptions])
def test_an_empty_host_is_not_every_address(options: type) -> None:
    with pytest.raises(UsageError, match=r"--host '': must not be empty; 0\.0\.0\.0 means"):
        options(host="")


def test_small_pieces_are_sent_at_once() -> None:
    """Else the second one of an answer waits for the client's acknowledgement of the first, 40 ms."""

    async def nodelay() -> int:
        found = asyncio.get_running_loop().create_future()

        async def look(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with cli.bind_socket("127.0.0.1", 0) as listener:
            server = await asyncio.start_server(look, sock=listener)
            _, writer = await asyncio.open_connection(*listener.getsockname())
            try:
                return await found
            finally:
                writer.close()
                server.close()

    assert asyncio.run(nodelay())


def test_server_failure_has_the_shape_of_openai(artefact: Path) -> None:
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    with serve(pool, AppOptions()) as address:
        pool.loaded["tiny"].engine.close()
        answer = post(address, **GREEDY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, None)
        assert "the model is closed" in json.dumps(answer.json())


def test_a_name_that_was_bound_to_this_machine_is_refused(artefact: Path) -> None:
    """DNS rebinding: a page of that name could read every answer."""
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    app = create_app(pool, AppOptions(allow_host=("friend.example",)), is_local=True)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        for host, status in (
            ("127.0.0.1:8000", 200),
            ("LOCALHOST", 200),
            ("[::1]:8000", 200),
            ("friend.example", 200),
            ("evil.example:8000", 403),
            ("127.0.0.1.evil.example", 403),
        ):
            answer = client.get("/v1/models", headers={"Host": host})
            assert answer.status_code == status, host
    assert "this server is not '127.0.0.1.evil.example'; allow the name with --allow-host" in answer.text


def test_the_key_may_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert AppOptions(api_key_file=str(file)).keys == ("secret",)
    assert AppOptions(api_key="flag", api_key_file=str(file)).keys == ("flag",)
    assert AppOptions().keys == ()
    monkeypatch.setenv("EFFICIENTLLM_API_KEY", "environment")
    assert AppOptions().keys == ("environment",)
    file.write_text("\n")
    with pytest.raises(UsageError, match=r"--api-key-file .*key: is empty"):
        _ = AppOptions(api_key_file=str(file)).keys


def test_each_of_several_keys_opens_the_server(artefact: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("kitchen-1\n\n  hall-2  \n")
    with served(artefact, AppOptions(api_key_file=str(file)), context=64) as address:
        for key, status in (("kitchen-1", 200), ("hall-2", 200), ("kitchen-1\nhall-2", 401), ("hall", 401)):
            headers = {"Authorization": "Bearer " + key.replace("\n", " ")}
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == status, key


def test_every_request_has_an_id_and_a_line(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(artefact, AppOptions(access_log=True, api_key="secret"), context=64) as address:
        chosen = httpx.get(f"{address}/health", headers={"X-Request-Id": "mine-1"})
        foreign = httpx.get(f"{address}/v1/a%0Ab c", headers={"X-Request-Id": 'a" 200 forged'})
        plain = httpx.get(f"{address}/health")
    assert chosen.headers["x-request-id"] == "mine-1"
    ids = [answer.headers["x-request-id"] for answer in (foreign, plain)]
    assert len({*ids, "mine-1"}) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["mine-1", *ids]
    shape = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ 127\.0\.0\.1 GET (\S+) (\d+) (\d+) bytes \d+\.\d{3} s \S+"
    found = [re.fullmatch(shape, line) for line in lines]
    assert [(one[1], one[2], int(one[3])) for one in found if one] == [
        ("/health", "200", len(chosen.content)),
        ("/v1/a\\nb%20c", "401", len(foreign.content)),
        ("/health", "200", len(plain.content)),
    ]


def test_a_refused_request_is_a_line_with_the_reason(artefact: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = {"model": "home", "messages": [{"role": "user", "content": "Hello"}]}
    with served(artefact, AppOptions(), context=64) as address:
        refused = httpx.post(f"{address}/api/chat", json=body)
    assert refused.status_code == 404
    assert f"POST /api/chat 404: {refused.json()['error']}" in caplog.messages


@pytest.mark.parametrize(
    ("header", "status"), [("Bearer secret", 200), ("bearer secret", 200), ("secret", 401), ("Basic secret", 401)]
)
def test_the_scheme_of_the_key_is_bearer_in_any_case(header: str, status: int) -> None:
    guard: Any = Guard(answer_ok, api_keys=["secret"], max_body_bytes=10)
    assert TestClient(guard).get("/v1/models", headers={"Authorization": header}).status_code == status


async def answer_ok(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("ok")(scope, receive, send)


def test_models_say_how_much_fits(address: str, artefact: Path) -> None:
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["max_model_len"] == 2048
    pool = loaded_pool(dict.fromkeys(("one", "two"), str(artefact)), EngineOptions(threads=1))
    assert pool.context_length("one") == pool.context_length("two") == 4096
    pool.close()


def shape_of(body: dict[str, Any]) -> str:
    return "Ollama" if isinstance(body["error"], str) else "OpenAI"


@pytest.mark.parametrize(("path", "shape"), [("/api/chat", "Ollama"), ("/v1/responses", "OpenAI")])
def test_errors_before_route_have_shape_of_their_api(artefact: Path, path: str, shape: str) -> None:
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    app = create_app(pool, AppOptions(api_key="secret", max_body_bytes=1000))
    with TestClient(app) as client:
        key = {"Authorization": "Bearer secret"}
        answers = {
            401: client.post(path, json={}),
            413: client.post(path, json={"model": "x" * 2000}, headers=key),
            415: client.post(path, content="{}", headers={**key, "Content-Type": "text/plain"}),
            404: client.post(f"{path}/nothing", json={}, headers=key),
            405: client.get(path, headers=key),
            400: client.post(path, json=[], headers=key),
        }
    for status, answer in answers.items():
        assert (answer.status_code, shape_of(answer.json())) == (status, shape), (status, answer.text)
    assert answers[401].headers["WWW-Authenticate"] == "Bearer"
    assert answers[405].headers["Allow"] == "POST"


def test_without_the_key_nothing_names_a_model(artefact: Path) -> None:
    pool = loaded_pool({"private": str(artefact)}, EngineOptions(threads=1, context=64))
    with TestClient(create_app(pool, AppOptions(api_key="secret"))) as client:
        for path in ("/", "/page/page.js", "/health", "/openapi.json"):
            answer = client.get(path)
            assert answer.status_code == 200, path
            assert "private" not in answer.text, path
        for path in ("/v1/models", "/api/tags"):
            assert client.get(path).status_code == 401, path
        for path in ("/tokenize", "/v1/embeddings", "/v1/responses"):
            assert client.post(path, json={}).status_code == 401, path
        headers = {"Authorization": "Bearer secret"}
        assert "private" in client.get("/health", headers=headers).json()["loaded"]
        assert client.head("/").status_code == client.head("/health").status_code == 200
        assert client.get("/page/app.py").status_code == 404
        assert client.get("/page/..%2fapp.py").status_code == 401  # no page's path
