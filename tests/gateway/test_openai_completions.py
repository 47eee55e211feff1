"""`/v1/completions` as OpenAI's own client sees it."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai.types import completion_create_params

from deepseek_triton.clients import Chunk, RequestRejected, Token, TopLogProb
from deepseek_triton.gateway.apis.openai_completions.body import CompletionBody
from tests.support.gateway import MODEL, FakeBackend, client_of, gateway
from tests.support.waiting import until


def test_every_field_of_openais_client_is_known() -> None:
    fields = {*completion_create_params.CompletionCreateParamsBase.__annotations__, "stream"}
    assert fields <= {*CompletionBody.model_fields, *CompletionBody.NOT_SUPPORTED}


def test_several_prompts_and_answers_have_their_own_index() -> None:
    chunks = [Chunk("a", "", 5, 1, 0), Chunk("b", "stop", 5, 1, 1), Chunk("c", "length", 5, 2, 0)]
    backend = FakeBackend(chunks)
    with client_of(backend) as client:
        whole = client.completions.create(model=MODEL, prompt=["x", "y"], n=2, extra_headers={"X-Request-Id": "id"})
        expected = [(0, "ac", "length"), (1, "b", "stop"), (2, "ac", "length"), (3, "b", "stop")]
        assert [(choice.index, choice.text, choice.finish_reason) for choice in whole.choices] == expected
        assert {call.request_id for call in backend.calls} == {"id-0", "id-1"}
        assert {request.prompt for request in backend.requests} == {"x", "y"}
        assert whole.usage is not None and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (10, 6)
        options: Any = {"include_usage": True}
        events = list(
            client.completions.create(model=MODEL, prompt=["x", "y"], n=2, stream=True, stream_options=options)
        )
        texts = {i: "".join(c.text for e in events for c in e.choices if c.index == i) for i in range(4)}
        assert texts == {0: "ac", 1: "b", 2: "ac", 3: "b"}
        assert events[-1].usage == whole.usage


def test_options_reach_the_model(client: openai.OpenAI, backend: FakeBackend) -> None:
    client.completions.create(model=MODEL, prompt="x")
    assert backend.requests[-1].max_tokens == 16, "OpenAI's default"
    client.completions.create(model=MODEL, prompt="x", echo=True, max_tokens=3, best_of=1, suffix="")
    assert backend.requests[-1].exclude_input_in_output is False and backend.requests[-1].max_tokens == 3


def test_log_probs_have_offsets() -> None:
    tops = ((TopLogProb(1, "a", -0.5), TopLogProb(2, "x", -2.0)), (TopLogProb(3, "bc", -0.1),))
    first = Chunk("a", "", 5, 1, log_probs=(-0.5,), tokens=(Token(1, "a"),), top_log_probs=tops[:1])
    second = Chunk("bc", "stop", 5, 2, log_probs=(-0.1,), tokens=(Token(3, "bc"),), top_log_probs=tops[1:])
    with client_of(FakeBackend([first, second])) as client:
        rows = client.completions.create(model=MODEL, prompt="x", logprobs=2).choices[0].logprobs
        assert rows is not None and rows.tokens == ["a", "bc"] and rows.token_logprobs == [-0.5, -0.1]
        assert rows.text_offset == [0, 1] and rows.top_logprobs == [{"a": -0.5, "x": -2.0}, {"bc": -0.1}]
        events = list(client.completions.create(model=MODEL, prompt="x", logprobs=2, stream=True))
        assert [event.choices[0].logprobs.text_offset for event in events] == [[0], [1]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [1, 2]}, "prompt", "token ids are not supported"),
        ({"prompt": [[1], [2]]}, "prompt", "token ids are not supported"),
        ({"prompt": ["x"] * 65}, "prompt", "at most 64"),
        ({"suffix": "end"}, "suffix", "suffix is not supported"),
        ({"best_of": 3}, "best_of", "best_of is not supported, except as n"),
        ({"logit_bias": {"1": 1}}, "logit_bias", "not supported"),
        ({"logprobs": 21}, "logprobs", "less than"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"echo": True, "logprobs": 1}, "logprobs", "with echo"),
        ({"messages": []}, "messages", "unknown field"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_is_refused_by_name(client: openai.OpenAI, change: dict[str, Any], param: str, message: str) -> None:
    answer = httpx.post(f"{client.base_url}completions", json={"model": MODEL, "prompt": "x", **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"]


def test_one_prompt_that_fails_ends_all() -> None:
    class Backend(FakeBackend):
        async def stream(self, model: Any, request: Any, call: Any) -> Any:
            if request.prompt == "bad":
                raise RequestRejected("the prompt is bad", "invalid")
            async for chunk in super().stream(model, request, call):
                yield chunk

    backend = Backend(pause_s=5)
    with client_of(backend) as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="the prompt is bad"):
                list(client.completions.create(model=MODEL, prompt=["x", "bad", "y"], stream=stream))
            assert backend.running == 0
    assert backend.cancelled == 4


@pytest.mark.slow
def test_all_prompts_end_when_the_client_leaves() -> None:
    backend = FakeBackend(pause_s=60)
    with gateway(backend) as url:
        for is_streamed in (True, False):
            backend.cancelled = 0
            body = {"model": MODEL, "prompt": ["x"] * 8, "stream": is_streamed}
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=body, timeout=0.5)
            until(lambda: (backend.running, backend.cancelled) == (0, 8))
