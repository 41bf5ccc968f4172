"""What OpenAI's clients ask for beyond a plain chat, several models, and load."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import loaded_pool, openai_client, post, serve, served

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError, UsageError
from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.memory import memory_bytes
from efficientllm.runtime.sampling import log_softmax
from efficientllm.server import cli
from efficientllm.server.models.pool_options import PoolOptions
from efficientllm.server.options import AppOptions
from efficientllm.server.schemas import response_models

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def address(artefact: Path) -> Iterator[str]:
    with served(artefact, AppOptions(cors_origin=("http://page.example",)), PoolOptions(waiting=40)) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai_client(address) as client:
        yield client


def test_text_completion_continues_the_prompt(client: openai.OpenAI, artefact: Path) -> None:
    engine = load_engine(artefact, EngineOptions(threads=1))
    tokens = engine.tokenize("The quick brown fox", special=False)
    answers = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
        for prompt in ("The quick brown fox", tokens)
    ]
    texts = [answer.choices[0].text for answer in answers]
    assert texts[0] == texts[1]
    pieces, logits = [], engine.prefill(tokens)
    for _ in range(8):
        pieces.append(engine.token_bytes(int(logits.argmax())))
        logits = engine.decode(int(logits.argmax()))
    assert texts[0] == b"".join(pieces).decode("utf-8", errors="replace")
    engine.close()
    several = client.completions.create(model="tiny", prompt=["One", "Two"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    stream = client.completions.create(model="tiny", prompt=tokens, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == texts[0]


def test_logprobs_belong_to_the_tokens(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    choice = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None
    records = choice.logprobs.content or []
    assert len(records) == 6
    assert b"".join(bytes(record.bytes or []) for record in records).decode(errors="replace") == choice.message.content
    for record in records:
        assert record.logprob == record.top_logprobs[0].logprob  # greedy
        values = [top.logprob for top in record.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1
    chunks = list(client.chat.completions.create(**settings, logprobs=True, stream=True))
    streamed = [record for chunk in chunks for record in (chunk.choices[0].logprobs or Empty).content or []]
    # the second time the prompt is cached, so that its last token is evaluated alone
    assert [record.logprob for record in streamed] == pytest.approx([record.logprob for record in records], abs=1e-4)
    assert client.chat.completions.create(**settings).choices[0].logprobs is None
    # a sampled answer could end early
    text = (
        client.completions.create(model="tiny", prompt="Hi", max_tokens=3, logprobs=2, temperature=0)
        .choices[0]
        .logprobs
    )
    assert text is not None
    assert len(text.tokens or []) == len(text.token_logprobs or []) == len(text.top_logprobs or []) == 3


def test_prompt_has_log_probabilities_of_its_tokens(address: str, artefact: Path) -> None:
    engine = load_engine(artefact, EngineOptions(threads=1))
    tokens = engine.tokenize("The quick brown fox jumps over the lazy dog. " * 12, special=False)
    expected: list[float | None] = [None]
    for end in range(1, len(tokens)):
        expected.append(float(log_softmax(engine.prefill(tokens[:end]))[tokens[end]]))
    engine.close()
    asked = {"prompt": tokens, "echo": True, "logprobs": 2, "temperature": 0}
    for count in (0, 3):
        (choice,) = post(address, "completions", **asked, max_tokens=count).json()["choices"]
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert found["token_logprobs"][1 : len(tokens)] == pytest.approx(expected[1:], abs=1e-3)
        assert len(found["token_logprobs"]) == len(tokens) + count
        assert "".join(found["tokens"]) == choice["text"]
    text = post(address, "completions", **asked, max_tokens=3, stream=True).text
    events = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
    streamed = [value for event in events if event["logprobs"] for value in event["logprobs"]["token_logprobs"]]
    assert streamed[1:] == pytest.approx(found["token_logprobs"][1:], abs=1e-3)
    assert "".join(event["text"] for event in events) == choice["text"]
    plain = post(address, "completions", prompt=tokens, max_tokens=3, temperature=0).json()["choices"][0]["text"]
    assert choice["text"].endswith(plain)


def test_prompt_may_only_be_evaluated(address: str) -> None:
    answer = post(address, "completions", prompt="Hello there", max_tokens=0).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "length")
    assert (answer["usage"]["completion_tokens"], answer["usage"]["prompt_tokens"] > 0) == (0, True)


class Empty:
    content: Any = None


def test_choices_differ_and_repeat_with_the_seed(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "n": 3, "seed": 11}
    first, second = (client.chat.completions.create(**settings) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**settings, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_json_mode_gives_json(client: openai.OpenAI) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=300, seed=seed, response_format={"type": "json_object"}
        )
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_large_bodies_are_refused_with_and_without_their_length(address: str) -> None:
    url = f"{address}/v1/chat/completions"
    kind = {"Content-Type": "application/json"}
    assert httpx.post(url, content=b"x" * 10_000_000, headers=kind).status_code == 413
    assert httpx.post(url, content=(b"x" * 100_000 for _ in range(30)), headers=kind).status_code == 413
    assert httpx.get(f"{address}/health").status_code == 200


def test_content_may_come_in_parts(address: str) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    answers = [
        post(address, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=5).json()
        for content in (parts, "Hello")
    ]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_other_pages_may_call_only_where_allowed(address: str) -> None:
    for origin, allowed in {"http://page.example": "http://page.example", "http://other.example": None}.items():
        answer = httpx.get(f"{address}/v1/models", headers={"Origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed


def test_unknown_paths_and_models_give_openai_errors(address: str, client: openai.OpenAI) -> None:
    assert httpx.get(f"{address}/v1/nothing").json()["error"]["message"] == "Not Found"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")


def test_answers_match_the_openapi_document(address: str) -> None:
    """The models forbid further fields, so they describe the whole answer."""
    for logprobs in (False, True):
        chat = post(address, messages=MESSAGES, max_tokens=4, n=2, logprobs=logprobs)
        response_models.ChatCompletion.model_validate(chat.json())
    text = post(address, "completions", prompt="Hi", max_tokens=4, logprobs=2)
    response_models.TextCompletion.model_validate(text.json())
    response_models.ErrorAnswer.model_validate(post(address, messages=[]).json())
    response_models.ModelList.model_validate(httpx.get(f"{address}/v1/models").json())
    response_models.ModelCard.model_validate(httpx.get(f"{address}/v1/models/tiny").json())
    response_models.Health.model_validate(httpx.get(f"{address}/health").json())
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    for path, method, name in (
        ("/v1/chat/completions", "post", "ChatCompletion"),
        ("/v1/completions", "post", "TextCompletion"),
        ("/v1/models", "get", "ModelList"),
        ("/health", "get", "Health"),
    ):
        content = paths[path][method]["responses"]["200"]["content"]
        assert content["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
        assert ("text/event-stream" in content) == (method == "post")


@pytest.mark.slow
def test_thirty_two_clients_get_their_own_answers(address: str) -> None:
    alone = {seed: post(address, messages=MESSAGES, max_tokens=24, seed=seed).json() for seed in range(32)}
    answers: dict[int, Any] = {}

    def ask(seed: int) -> None:
        answers[seed] = post(address, messages=MESSAGES, max_tokens=24, seed=seed).json()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(32):
        assert answers[seed]["choices"] == alone[seed]["choices"]


@pytest.mark.slow
def test_memory_stays_flat(address: str) -> None:
    """400 requests; the benchmark sends 10,000."""
    with httpx.Client() as client:

        def ask(count: int) -> None:
            for index in range(count):
                body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "seed": index}
                assert client.post(f"{address}/v1/chat/completions", json=body).status_code == 200

        ask(200)
        before = memory_bytes()["rss_anon_bytes"]
        ask(400)
        assert memory_bytes()["rss_anon_bytes"] - before < 4e6


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(address: str, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json", "--max-examples", "10"),
        *("--checks", "not_a_server_error,response_schema_conformance,status_code_conformance"),
        *("--generation-deterministic", "--phases", "examples,coverage,fuzzing"),
    ]
    # it keeps what it found in the current folder
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_models_are_loaded_on_use_and_the_oldest_leaves(artefact: Path) -> None:
    names = ("first", "second", "third")
    room = int(2.5 * Artefact.open(artefact).file_bytes)
    pool = loaded_pool(
        dict.fromkeys(names, str(artefact)), EngineOptions(threads=1, context=64), PoolOptions(max_memory=room)
    )
    with serve(pool, AppOptions()) as address:

        def ask(name: str) -> int:
            body = {"model": name, "messages": MESSAGES, "max_tokens": 2}
            return httpx.post(f"{address}/v1/chat/completions", json=body).status_code

        def loaded() -> list[str]:
            return list(httpx.get(f"{address}/health").json()["loaded"])

        assert loaded() == ["first"]
        assert ask("second") == 200
        assert loaded() == ["first", "second"]
        assert ask("first") == 200  # now second is the oldest
        assert ask("third") == 200
        assert loaded() == ["first", "third"]
        assert ask("second") == 200
        assert loaded() == ["third", "second"]
        assert (ask(""), ask("fourth")) == (400, 404)  # which of them?


def test_vanished_model_is_unavailable_until_it_returns(artefact: Path, tmp_path: Path) -> None:
    second = Path(shutil.copytree(artefact, tmp_path / "second"))
    pool = loaded_pool({"first": str(artefact), "second": str(second)}, EngineOptions(threads=1, context=64))
    with serve(pool, AppOptions()) as address:
        second.rename(tmp_path / "away")
        answer = post(address, model="second", messages=MESSAGES, max_tokens=1)
        assert answer.status_code == 503
        assert "model 'second' cannot be loaded: " in answer.json()["error"]["message"]
        (tmp_path / "away").rename(second)
        assert post(address, model="second", messages=MESSAGES, max_tokens=1).status_code == 200


def test_an_answer_has_its_time(artefact: Path) -> None:
    with served(artefact, AppOptions(overflow="slide"), PoolOptions(timeout=0.05), context=4096) as address:
        endless: dict[str, Any] = {"max_tokens": 100_000, "temperature": 1, "logit_bias": {"50": 100, "51": 100}}
        answer = post(address, messages=MESSAGES, **endless)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "false")
        assert "longer than 0.05 s" in answer.json()["error"]["message"]
        with httpx.stream(
            "POST",
            f"{address}/v1/chat/completions",
            json={"model": "tiny", "messages": MESSAGES, "stream": True, **endless},
        ) as stream:
            events = [line for line in stream.iter_lines() if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        deadline = time.monotonic() + 30
        while httpx.get(f"{address}/health").json()["in_flight"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_chat_may_outgrow_the_window_when_asked(artefact: Path) -> None:
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=64))
    with serve(pool, AppOptions(overflow="slide")) as address:
        answer = post(address, messages=MESSAGES, max_tokens=150, seed=0, temperature=1.0)
        if answer.json()["choices"][0]["finish_reason"] == "length":
            assert answer.json()["usage"]["completion_tokens"] == 150
        long = [{"role": "user", "content": "word " * 200}]
        assert post(address, messages=long, max_tokens=2).status_code == 200
    with served(artefact, context=64) as address:
        assert post(address, messages=long, max_tokens=2).json()["error"]["code"] == "context_length_exceeded"


def test_bad_models_give_one_line(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    with pytest.raises(ArtefactError, match="not a GGUF file"):
        loaded_pool({"broken": str(broken)}, EngineOptions())
    assert run_command(cli.body, [str(artefact), "--model", "nothing"]) == 2
    assert "--model nothing: must be NAME=PATH" in capsys.readouterr().err
    assert run_command(cli.body, []) == 2
    assert "give an artefact" in capsys.readouterr().err
    with pytest.raises(UsageError, match="two models have the same name"):
        cli.named_artefacts(str(artefact), [f"gguf={artefact}"])
