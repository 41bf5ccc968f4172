"""POST /v1/embeddings, against the hidden states that transformers gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from serving import openai_client, served
from tiny import tiny_architecture, tiny_model
from transformers import PreTrainedTokenizerFast

from efficientllm.server.schemas import response_models

TEXT = "The quick brown fox jumps over the lazy dog. " * 4
"""More than one pass of the engine's."""


@pytest.fixture(scope="module")
def client(artefact: Path) -> Iterator[openai.OpenAI]:
    with served(artefact) as address, openai_client(address) as client:
        yield client


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_last_states_of_the_model(
    client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast, pooling: str
) -> None:
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    with torch.no_grad():
        states = tiny_model(tiny_architecture()).model(torch.tensor([tokens])).last_hidden_state[0].double().numpy()
    expected = states[-1] if pooling == "last" else states.mean(axis=0)
    texts: Any = [TEXT, tokens]
    answer = client.embeddings.create(model="tiny", input=texts, extra_body={"pooling": pooling})
    for item in answer.data:
        np.testing.assert_allclose(item.embedding, expected / np.linalg.norm(expected), atol=2e-3)
    assert answer.usage.prompt_tokens == 2 * len(tokens)


def test_numbers_and_bytes_say_the_same_and_bad_texts_are_refused(client: openai.OpenAI) -> None:
    def post(**body: Any) -> httpx.Response:
        return httpx.post(f"{client.base_url}embeddings", json={"model": "tiny", **body}, timeout=60)

    numbers = post(input="Hello").json()
    response_models.Embeddings.model_validate(numbers)
    packed = client.embeddings.create(model="tiny", input="Hello", encoding_format="base64").data[0].embedding
    assert isinstance(packed, str | list)
    response_models.Embeddings.model_validate(post(input="Hello", encoding_format="base64").json())
    assert client.embeddings.create(model="tiny", input="Hello").data[0].embedding == numbers["data"][0]["embedding"]
    assert post(input="word " * 2000).json()["error"]["code"] == "context_length_exceeded"
    assert (
        post(input=[400]).status_code == post(input="").status_code == post(dimensions=8, input="x").status_code == 400
    )
