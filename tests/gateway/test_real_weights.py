"""SmolLM2's real weights behind the gateway: what comes out is language, and equals what Triton itself gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from deepseek_triton.clients import GenerateRequest, GrpcClient, Message
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME
from tests.support.gateway import gateway

pytestmark = [pytest.mark.server]

QUESTION = "What is the capital of France?"
ASK: Any = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[openai.OpenAI]:
    with (
        gateway(backend_urls=(server.grpc_url,), models=(NAME,)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        yield client


def test_chats_completions_and_responses_say_what_triton_says(client: openai.OpenAI, server: TritonServer) -> None:
    with GrpcClient(server.grpc_url, NAME) as direct:
        expected = direct.generate(GenerateRequest(messages=[Message("user", QUESTION)], max_tokens=20)).text
        continued = direct.generate(GenerateRequest(prompt=QUESTION, max_tokens=5)).text
    assert "Paris" in expected
    chat = client.chat.completions.create(model=NAME, messages=ASK, max_tokens=20)
    assert chat.choices[0].message.content == expected
    assert client.responses.create(model=NAME, input=QUESTION, max_output_tokens=20).output_text == expected
    texts = [
        choice.text for choice in client.completions.create(model=NAME, prompt=[QUESTION] * 2, max_tokens=5).choices
    ]
    assert texts == [continued] * 2
    echoed = client.completions.create(model=NAME, prompt=QUESTION, max_tokens=5, echo=True)
    assert echoed.choices[0].text == QUESTION + continued


class City(BaseModel):
    name: str = Field(max_length=20)
    is_capital: bool


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model=NAME, messages=ASK, response_format=City, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, City)


def test_stop_words_end_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=ASK, max_tokens=20, stop=["Paris"])
    assert answer.choices[0].finish_reason == "stop" and "Paris" not in (answer.choices[0].message.content or "")


def test_what_this_model_lacks_is_refused_by_name(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f"}}
    for options, param in (({"tools": [tool]}, "tools"), ({"reasoning_effort": "high"}, "reasoning_effort")):
        with pytest.raises(openai.BadRequestError, match=param) as caught:
            client.chat.completions.create(model=NAME, messages=ASK, **options)
        assert caught.value.param == param
    client.chat.completions.create(model=NAME, messages=ASK, max_tokens=2, reasoning_effort="none")


def test_a_server_that_names_no_models_says_what_to_do(server: TritonServer) -> None:
    """Triton's index is the administrator's: the models are named on the command line."""
    with gateway(backend_urls=(server.grpc_url,)) as url:
        answer = httpx.get(f"{url}/v1/models")
    assert answer.status_code == 502 and "name them with --model" in answer.json()["error"]["message"]
