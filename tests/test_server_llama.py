"""llama-server's own API over HTTP: the same answers as OpenAI's, with llama.cpp's fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import loaded_pool, serve

from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.server.options import AppOptions

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def client(artefact: Path) -> Iterator[httpx.Client]:
    pool = loaded_pool({"tiny": str(artefact)}, EngineOptions(threads=1, context=256, parallel=4))
    with serve(pool, AppOptions()) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def complete(client: httpx.Client, **body: Any) -> Any:
    answer = client.post("/completion", json={"prompt": "Hello", "n_predict": 12, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a streamed answer."""
    asked = {"prompt": "Hello", "n_predict": 12, "temperature": 0, "stream": True, **body}
    answer = client.post("/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]


def test_a_completion_is_that_of_openai_s_api(client: httpx.Client) -> None:
    asked = {"prompt": "Hello", "temperature": 0, "max_tokens": 12}
    expected = client.post("/v1/completions", json=asked).json()
    whole = complete(client, return_tokens=True)
    assert whole["content"] == expected["choices"][0]["text"]
    assert (whole["tokens_predicted"], whole["tokens_evaluated"], len(whole["tokens"])) == (12, 4, 12)
    assert (whole["stop"], whole["stop_type"], whole["stopping_word"], whole["truncated"]) == (True, "limit", "", False)
    assert (whole["model"], whole["prompt"]) == ("tiny", "Hello")
    assert whole["generation_settings"]["n_predict"] == 12
    timings = whole["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == 4
    assert timings["predicted_n"] == 12
    assert timings["predicted_ms"] > 0 < timings["prompt_ms"]
    *pieces, last = events(client)
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert not any(piece["stop"] for piece in pieces)
    assert (last["stop"], last["content"], last["tokens_predicted"]) == (True, "", 12)


@pytest.mark.parametrize("prompts", [["Hello", "Good morning"], [[5, 6, 7], [8, 9]], ["Hello", [5, 6, 7]]])
def test_several_prompts_have_several_answers(client: httpx.Client, prompts: list[Any]) -> None:
    answers = complete(client, prompt=prompts)
    assert [each["index"] for each in answers] == [0, 1]
    assert [each["content"] for each in answers] == [complete(client, prompt=one)["content"] for one in prompts]


def test_the_reason_of_the_end_is_told(client: httpx.Client) -> None:
    text = complete(client)["content"]
    stop = text[3:5]
    whole = complete(client, stop=[stop])
    assert (whole["content"], whole["stop_type"], whole["stopping_word"]) == (text[: text.index(stop)], "word", stop)
    assert complete(client, json_schema={"enum": ["a", "b"]}, n_predict=-1)["stop_type"] == "eos"
    end = client.post("/tokenize", json={"content": "<|im_end|>"}).json()["tokens"][0]
    ended = complete(client, logit_bias=[[end, 99.0]], n_predict=-1)
    assert (ended["content"], ended["stop_type"]) == ("", "eos")
    full = complete(client, n_predict=-1, logit_bias=[[end, False]])
    assert (full["stop_type"], full["tokens_predicted"]) == ("limit", 256 - 4)


def test_a_prompt_may_only_be_evaluated(client: httpx.Client) -> None:
    asked = {"prompt": "A prompt of its own, for later", "n_predict": 0}
    whole = complete(client, **asked)
    assert (whole["content"], whole["tokens_predicted"], whole["stop_type"]) == ("", 0, "limit")
    assert [event["stop"] for event in events(client, **asked)] == [True]
    assert complete(client, prompt=asked["prompt"])["tokens_cached"] == whole["tokens_evaluated"] - 1


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"grammar": 'root ::= color ("!" | "?")\ncolor ::= "red" | "blue"'}, {"red!", "red?", "blue!", "blue?"}),
        ({"grammar": 'start: "yes" | "no"'}, {"yes", "no"}),
        ({"json_schema": {"enum": ["a", "b"]}}, {'"a"', '"b"'}),
    ],
)
def test_answers_follow_grammars(client: httpx.Client, fields: dict[str, Any], answers: set[str]) -> None:
    assert complete(client, **fields, n_predict=40)["content"] in answers


def test_a_rendered_template_is_continued_like_the_chat(client: httpx.Client) -> None:
    """Its control tokens are control tokens."""
    prompt = client.post("/apply-template", json={"messages": MESSAGES}).json()["prompt"]
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    )
    asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    expected = client.post("/v1/chat/completions", json=asked).json()
    whole = complete(client, prompt=prompt)
    assert whole["content"] == expected["choices"][0]["message"]["content"]
    assert whole["tokens_evaluated"] == expected["usage"]["prompt_tokens"]


def test_what_turns_nothing_on_may_be_there(client: httpx.Client) -> None:
    """The fields that llama.cpp's page and other clients send with every request."""
    fields = {"cache_prompt": True, "id_slot": -1, "mirostat": 0, "mirostat_tau": 5.0, "typical_p": 1, "tfs_z": 1}
    fields |= {"samplers": ["top_k"], "dry_multiplier": 0, "dry_base": 1.75, "xtc_probability": 0, "n_probs": 0}
    fields |= {"ignore_eos": False, "repeat_last_n": 64, "n_keep": 0, "timings_per_token": True, "lora": []}
    fields |= {"top_k": -1, "seed": 2**32 - 1, "min_keep": 0, "dynatemp_range": 0, "t_max_predict_ms": 0}
    assert complete(client, **fields)["content"] == complete(client)["content"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mirostat": 2}, "mirostat is not served here"),
        ({"ignore_eos": True}, "ignore_eos is not served here"),
        ({"n_probs": 3}, "n_probs is not served here"),
        ({"grammar": "root ::= ("}, "grammar: "),
        ({"grammar": "root ::= " + "(" * 50_000}, "grammar: "),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "grammar: cannot be combined"),
        ({"prompt": []}, "prompt: "),
    ],
)
def test_what_is_not_served_is_one_line(client: httpx.Client, fields: dict[str, Any], message: str) -> None:
    answer = client.post("/completion", json={"prompt": "Hello", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert "\n" not in answer.json()["error"]["message"]


def test_properties_describe_the_model(client: httpx.Client) -> None:
    found = client.get("/props").json()
    assert found["total_slots"] == 4
    assert "<|im_start|>" in found["chat_template"]
    settings = found["default_generation_settings"]
    assert settings["n_ctx"] == 256
    assert settings["params"]["temperature"] == 0.8
    assert client.get("/props", params={"model": "other"}).status_code == 404


def test_tokens_have_pieces(client: httpx.Client) -> None:
    found = client.post("/tokenize", json={"content": "Hi 東<|im_end|>", "with_pieces": True}).json()["tokens"]
    pieces = [each["piece"] for each in found]
    assert pieces[-1] == "<|im_end|>"
    plain = client.post("/tokenize", json={"content": "Hi 東<|im_end|>"}).json()["tokens"]
    assert [each["id"] for each in found] == plain
    parts = [piece.encode() if isinstance(piece, str) else bytes(piece) for piece in pieces]
    assert b"".join(parts).decode() == "Hi 東<|im_end|>"
    assert any(isinstance(piece, list) for piece in pieces)
