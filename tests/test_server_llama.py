"""llama-server's own API over HTTP: the same answers as OpenAI's, with llama.cpp's fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import http_client, served

from efficientllm.runtime.generation import MAX_REPEATS

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def client(artefact: Path) -> Iterator[httpx.Client]:
    with served(artefact, context=256, parallel=4) as address, http_client(address) as client:
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


def test_completion_gives_the_answer_of_openai_api(client: httpx.Client) -> None:
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


def test_completion_names_the_reason_of_its_end(client: httpx.Client) -> None:
    text = complete(client)["content"]
    stop = text[3:5]
    whole = complete(client, stop=[stop])
    assert (whole["content"], whole["stop_type"], whole["stopping_word"]) == (text[: text.index(stop)], "word", stop)
    assert complete(client, json_schema={"enum": ["a", "b"]}, n_predict=-1)["stop_type"] == "eos"
    end = client.post("/tokenize", json={"content": "<|im_end|>"}).json()["tokens"][0]
    ended = complete(client, logit_bias=[[end, 99.0]], n_predict=-1)
    assert (ended["content"], ended["stop_type"]) == ("", "eos")
    full = complete(client, n_predict=-1, logit_bias=[[end, False]], temperature=2, top_k=0, seed=1)
    assert (full["stop_type"], full["tokens_predicted"]) == ("limit", 256 - 4)
    endless = complete(client, n_predict=-1, logit_bias=[["z", 99.0]])
    assert (endless["stop_type"], endless["tokens_predicted"]) == ("limit", MAX_REPEATS)
    assert complete(client, n_predict=70, logit_bias=[["z", 99.0]])["tokens_predicted"] == 70


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


def test_events_carry_tokens_and_probabilities(client: httpx.Client) -> None:
    whole = complete(client, return_tokens=True, n_probs=3)
    *pieces, last = events(client, n_probs=3, timings_per_token=True)
    assert [token for piece in pieces for token in piece["tokens"]] == whole["tokens"]
    assert all("predicted_n" in piece["timings"] for piece in pieces)
    records = whole["completion_probabilities"]
    assert [record["id"] for record in records] == whole["tokens"]
    assert all(record["id"] == record["top_logprobs"][0]["id"] for record in records)  # greedy
    assert [len(record["top_logprobs"]) for record in records] == [3] * 12
    streamed = [record["id"] for event in (*pieces, last) for record in event.get("completion_probabilities", [])]
    assert streamed == whole["tokens"]


def test_response_fields_select_parts_of_answer(client: httpx.Client) -> None:
    whole = complete(client, response_fields=["content", "generation_settings/n_predict", "nothing/at all"])
    assert whole == {"content": complete(client)["content"], "generation_settings/n_predict": 12}


def test_ignore_eos_and_biased_texts_change_tokens(client: httpx.Client) -> None:
    ends = client.post("/tokenize", json={"content": "<|im_end|><|endoftext|>"}).json()["tokens"]
    loves_end = [[end, 90.0] for end in ends]
    assert complete(client, logit_bias=loves_end)["stop_type"] == "eos"
    assert complete(client, logit_bias=loves_end, ignore_eos=True)["tokens_predicted"] == 12
    for biases in ([["zq", 90.0]], {"zq": 90.0}):
        assert set(complete(client, logit_bias=biases)["content"]) <= {"z", "q"}


def test_prompt_may_mix_tokens_and_texts(client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"content": "Hello"}).json()["tokens"]
    expected = complete(client)["content"]
    assert complete(client, prompt=[*tokens[:2], "llo"])["tokens_evaluated"] > 2
    assert [each["content"] for each in complete(client, prompt=[tokens, {"prompt_string": "Hello"}])] == [expected] * 2
    mixed = {"input": [{"content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}, "Hello"]}
    first, second = client.post("/embeddings", json=mixed).json()["data"]
    assert first["embedding"] == second["embedding"]


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions", "/responses"])
def test_any_name_means_only_model_on_paths_without_prefix(client: httpx.Client, path: str) -> None:
    asked = {"input": "Hello"} if "responses" in path else {"messages": MESSAGES[1:]}
    limit = {"max_tokens": 2} if "responses" not in path else {}
    answer = client.post(path, json={"model": "gpt-3.5-turbo", **asked, **limit})
    assert (answer.status_code, answer.json()["model"]) == (200, "tiny")


def test_paths_without_prefix_are_served(client: httpx.Client) -> None:
    assert client.get("/models").json() == client.get("/v1/models").json()
    assert client.get("/v1/health").json()["status"] == "ok"
    asked = {"messages": MESSAGES}
    usage = client.post("/chat/completions", json={**asked, "max_tokens": 1}).json()["usage"]
    counted = client.post("/chat/completions/input_tokens", json=asked).json()
    assert counted == {"input_tokens": usage["prompt_tokens"]}


def test_chat_takes_fields_of_llama_server(client: httpx.Client) -> None:
    asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": 8, "n_probs": 0}
    plain = client.post("/v1/chat/completions", json={**asked, "n_probs": None}).json()
    fields = {"cache_prompt": True, "id_slot": 0, "mirostat": 0, "dry_multiplier": 0.0, "typical_p": 1, "samplers": []}
    fields |= {"reasoning_format": "auto", "return_progress": True, "verbosity": "low", "add_generation_prompt": True}
    del asked["max_tokens"], asked["n_probs"]
    other = client.post("/chat/completions", json={**asked, **fields, "n_predict": 8, "repeat_penalty": 1.0})
    assert other.json()["choices"] == plain["choices"], other.text
    assert other.json()["system_fingerprint"].startswith("b")
    assert other.json()["timings"]["predicted_n"] == 8
    for name, value in (("json_schema", {"const": "a"}), ("grammar", 'root ::= "\\"a\\""')):
        answer = client.post("/chat/completions", json={**asked, name: value}).json()
        assert answer["choices"][0]["message"]["content"] == '"a"'
    assert client.post("/v1/chat/completions", json={**asked, "top_p": 0, "max_tokens": 2}).status_code == 200
    for wrong in ({"grammar": "root ::= ("}, {"add_generation_prompt": False}, {"mirostat": 2}):
        assert client.post("/chat/completions", json={**asked, **wrong}).status_code == 400


def test_stream_has_timings_at_its_end_or_in_each_event(client: httpx.Client) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    for each in (False, True):
        text = client.post("/v1/chat/completions", json={**asked, "timings_per_token": each}).text
        found = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        timed = ["timings" in event for event in found]
        assert timed == [False, *[each] * (len(found) - 3), True, True]
        assert all(event["system_fingerprint"].startswith("b") for event in found)


def test_prompt_that_does_not_fit_is_measured_in_error(client: httpx.Client) -> None:
    answer = client.post("/completion", json={"prompt": "word " * 400})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["n_ctx"]) == (400, "exceed_context_size_error", 256)
    assert error["n_prompt_tokens"] > 256


def test_server_accepts_fields_that_turn_nothing_on(client: httpx.Client) -> None:
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
        ({"post_sampling_probs": True}, "post_sampling_probs is not served here"),
        ({"logit_bias": [["x", "y"]]}, "logit_bias.0.1: "),
        ({"grammar": "root ::= ("}, "grammar: "),
        ({"grammar": "root ::= " + "(" * 50_000}, "grammar: "),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "grammar: cannot be combined"),
        ({"prompt": []}, "prompt: "),
    ],
)
def test_unserved_fields_give_one_line(client: httpx.Client, fields: dict[str, Any], message: str) -> None:
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


def test_tokens_have_pieces(client: httpx.Client) -> None:
    found = client.post("/tokenize", json={"content": "Hi 東<|im_end|>", "with_pieces": True}).json()["tokens"]
    pieces = [each["piece"] for each in found]
    assert pieces[-1] == "<|im_end|>"
    plain = client.post("/tokenize", json={"content": "Hi 東<|im_end|>"}).json()["tokens"]
    assert [each["id"] for each in found] == plain
    parts = [piece.encode() if isinstance(piece, str) else bytes(piece) for piece in pieces]
    assert b"".join(parts).decode() == "Hi 東<|im_end|>"
    assert any(isinstance(piece, list) for piece in pieces)
