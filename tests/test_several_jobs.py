"""Several jobs in one model: the name of each in its examples, as a model of the server, and in its scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from exporting import export
from serving import http_client, loaded_pool, serve
from training import ERRORS, command, run

from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import DataError, UsageError
from efficientllm.runtime.engines.engine import EngineOptions
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.runtime.prompt import in_job
from efficientllm.server.models.pool import ModelPool
from efficientllm.server.options import AppOptions
from efficientllm.train.data.chat import Chat, ChatFormat, check_jobs
from efficientllm.train.data.documents import DataSpec, check_documents, open_documents
from efficientllm.train.evaluation import cli as eval_cli
from efficientllm.train.evaluation.jobs import read_examples

JOBS = ("notes", "replies")


def test_a_job_is_named_at_the_start_of_the_system_message() -> None:
    asked = {"role": "user", "content": "Hi"}
    assert in_job([asked], "notes") == [{"role": "system", "content": "notes"}, asked]
    system = {"role": "system", "content": "Be brief."}
    assert in_job([system, asked], "notes") == [{"role": "system", "content": "notes\nBe brief."}, asked]
    assert in_job([system, asked], "") == [system, asked]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of chats for each job. Both have the same questions."""
    folder = tmp_path_factory.mktemp("jobs")
    for job in JOBS:
        chats = [{"prompt": f"text {index % 50}", "completion": f"{job} of {index}"} for index in range(300)]
        (folder / f"{job}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return {job: folder / f"{job}.jsonl" for job in JOBS}


@pytest.fixture(scope="module")
def trained(source_folder: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    arguments = command(source_folder, data["notes"], folder / "run", "--sequence-length", "64", "--eval-tokens", "512")
    place = arguments.index(str(data["notes"]))
    arguments[place : place + 1] = [f"{data['notes']}@notes:0.5", "--data", f"{data['replies']}@replies:0.5"]
    assert run(arguments) == 0
    assert export(folder / "run", "gguf", folder / "gguf", "--quantize", "f32") == 0
    return folder / "gguf"


@pytest.fixture(scope="module")
def client(trained: Path, artefact: Path) -> Iterator[httpx.Client]:
    pool = loaded_pool({"one": str(trained), "other": str(artefact)}, EngineOptions(threads=1, context=512))
    with serve(pool, AppOptions()) as address, http_client(address) as client:
        yield client


def test_data_names_the_job_of_its_chats(data: dict[str, Path], corpus: Path) -> None:
    spec = DataSpec.parse(f"{data['notes']}@notes:0.3")
    assert (spec.path, spec.job, spec.weight) == (str(data["notes"]), "notes", 0.3)
    (chat, *_) = open_documents(spec)
    (example,) = read_examples(f"{data['notes']}@notes", 1)
    assert chat == example.chat
    assert example.chat.messages[0] == {"role": "system", "content": "notes"}
    assert DataSpec.parse("owner/name@config").job == ""
    with pytest.raises(UsageError, match="a job's name has letters, digits"):
        DataSpec.parse(f"{data['notes']}@two words")
    with pytest.raises(DataError, match=r"line 1 holds text, and the examples of the job notes are chats"):
        check_documents(DataSpec.parse(f"{corpus}@notes"))


def answer(client: httpx.Client, model: str, text: str, *system: str) -> tuple[str, int]:
    """Return the greedy answer and the number of tokens of the prompt."""
    messages = [*({"role": "system", "content": each} for each in system), {"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 12}
    found = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    count = client.post("/v1/chat/completions/input_tokens", json={"model": model, "messages": messages}).json()
    assert count["input_tokens"] == found["usage"]["prompt_tokens"]
    return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]


def test_jobs_are_models_of_every_api(client: httpx.Client, trained: Path) -> None:
    assert Manifest.read(trained).training["job_names"] == [*JOBS]
    names = ["one", "other", "one:notes", "one:replies"]
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == names
    assert client.get("/v1/models/one:notes").json()["id"] == "one:notes"
    tags = [each["name"] for each in client.get("/api/tags").json()["models"]]
    assert tags == ["one:latest", "other:latest", "one:notes", "one:replies"]
    expected, count = answer(client, "one", "text 3", "notes")
    assert answer(client, "one:notes", "text 3") == (expected, count)
    assert answer(client, "one:notes", "text 3", "Be brief.") == answer(client, "one", "text 3", "notes\nBe brief.")
    body: Any = {"model": "one:notes", "messages": [{"role": "user", "content": "text 3"}], "stream": False}
    options = {"temperature": 0, "num_predict": 12}
    ollama = client.post("/api/chat", json={**body, "options": options}).json()
    assert (ollama["model"], ollama["message"]["content"]) == ("one:notes", expected)
    response = client.post("/v1/responses", json={"model": "one:notes", "input": "text 3", "max_output_tokens": 12})
    assert response.json()["usage"]["input_tokens"] == count
    assert set(client.get("/health").json()["loaded"]) >= {"one"}
    assert "one:notes" not in client.get("/health").json()["loaded"]  # a job is no load of its own
    unknown = client.post("/v1/chat/completions", json={**body, "model": "one:other"})
    assert unknown.status_code == 404
    assert "this server has 'one', 'other', 'one:notes', 'one:replies'" in unknown.json()["error"]["message"]
    for path, text in (("completions", {"prompt": "a"}), ("embeddings", {"input": "a"})):
        refused = client.post(f"/v1/{path}", json={"model": "one:notes", **text})
        assert refused.json()["error"]["message"].endswith("is a job of chats, which a text has not; ask for one")
    assert client.post("/api/generate", json={"model": "one:notes", "keep_alive": 0}).json()["done_reason"] == "unload"


def test_a_misspelt_job_of_the_only_model_is_unknown(trained: Path) -> None:
    pool = loaded_pool({"one": str(trained)}, EngineOptions(threads=1, context=256))
    names = {"": "one", "any": "any", "one:notes": "one:notes", "one:nots": "one:nots"}
    assert {name: pool.named(name) for name in names} == names
    pool.close()
    with pytest.raises(UsageError, match="--model one:notes: is the name of a job; choose another name"):
        ModelPool({"one": str(trained), "one:notes": str(trained)}, EngineOptions(threads=1))


def test_no_job_answers_from_the_cache_of_another(client: httpx.Client) -> None:
    """Also while both are answered together, where their prompts differ in one line."""
    asked = [(f"one:{job}", f"text {index}") for index in range(12) for job in JOBS]
    alone = [answer(client, *each) for each in asked]
    assert [answer(client, "one", text, model.removeprefix("one:")) for model, text in asked] == alone
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda each: answer(client, *each), asked)) == alone


def test_a_score_has_the_name_of_its_job(trained: Path, data: dict[str, Path], tmp_path: Path, capsys: ERRORS) -> None:
    task, output = f"{data['notes']}@notes", f"--output={tmp_path}"
    arguments = [str(trained), "--task", task, "--task-limit", "3", "--task-tokens", "4", "--write", output]
    assert run_command(eval_cli.body, arguments) == 0, capsys.readouterr().err
    (score,) = Manifest.read(trained).jobs
    assert (score["job"], score["task"]) == ("notes", "notes.jsonl")
    assert run_command(eval_cli.body, [str(trained), "--task", f"{task}s", output]) == 2
    assert "has no job notess; its jobs are notes, replies" in capsys.readouterr().err


def test_a_greeting_stays_unlearned_and_a_template_must_write_the_name() -> None:
    chat = Chat.of(("assistant", "Hello."), ("user", "Hi"), ("assistant", "Yes.")).in_job("notes")
    assert list(filter(chat.is_learned, chat.answers)) == [3]
    silent = "{% for each in messages if each.role != 'system' %}{{ each.role }}: {{ each.content }}\n{% endfor %}"
    silent += "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(UsageError, match="@notes: the chat template drops the system message"):
        check_jobs(ChatFormat.of(silent, "", ""), ["", "notes"])
