"""`/v1/embeddings`, as OpenAI's client reads it."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from deepseek_triton.clients import Embedding
from deepseek_triton.gateway.backend.base import UpstreamCall
from tests.support.gateway import MODEL, FakeBackend, client_of, gateway


class Embedder(FakeBackend):
    async def embed(self, model: str, texts: Sequence[str], call: UpstreamCall) -> tuple[Embedding, ...]:
        return tuple(Embedding((3.0, float(len(text)), 0.0), len(text)) for text in texts)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with client_of(Embedder()) as client:
        yield client


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_openais_client_gets_unit_vectors_in_order(client: openai.OpenAI, encoding: Any) -> None:
    asked = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model="judge", input=["four", ""], **asked)
    found = [
        np.frombuffer(base64.b64decode(row.embedding), "<f4") if isinstance(row.embedding, str) else row.embedding
        for row in answer.data
    ]
    np.testing.assert_allclose(np.array(found, np.float64), [[0.6, 0.8, 0.0], [1.0, 0.0, 0.0]], rtol=1e-6)
    assert [row.index for row in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (4, 4)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input": [1, 2]}, "input[0]"),
        ({"input": []}, "input"),
        ({}, "input"),
        ({"input": "x", "dimensions": 2}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_a_wrong_body_is_refused_by_name(client: openai.OpenAI, body: Any, named: str) -> None:
    answer = httpx.post(f"{client.base_url}embeddings", json={"model": "judge", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)


def test_a_model_without_embeddings_says_so() -> None:
    with gateway(FakeBackend()) as url:
        answer = httpx.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "x"})
    assert answer.status_code == 404 and "embeddings" in answer.json()["error"]["message"]
