"""`/v1/chat/completions` as OpenAI's own client sees it, in front of answers that the test writes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from deepseek_triton.clients import Chunk, RequestRejected, ServerOverloaded, Token, ToolCall, TopLogProb
from tests.support.gateway import MODEL, FakeBackend, client_of, gateway

HI: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("another")


def test_every_option_reaches_the_model(client: openai.OpenAI, backend: FakeBackend) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Be brief"}, *HI],
        temperature=0.5,
        top_p=0.9,
        n=2,
        seed=-1,
        stop=["a", "b"],
        max_completion_tokens=7,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        logprobs=True,
        top_logprobs=3,
        reasoning_effort="low",
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "bad_words": ["x"]},
        extra_headers={"X-Request-Id": "my-request"},
    )
    request = backend.requests[-1]
    assert backend.calls[-1].request_id == "my-request"
    assert [getattr(turn, "role", None) for turn in request.messages or ()] == ["system", "user"]
    given = {
        "temperature": 0.5, "top_p": 0.9, "num_return_sequences": 2, "seed": 2**64 - 1, "stop_words": ("a", "b"),
        "max_tokens": 7, "frequency_penalty": 0.1, "presence_penalty": 0.2, "return_log_probs": True,
        "num_top_log_probs": 3, "thinking_token_budget": 1024, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1,
        "min_tokens": 2, "bad_words": ("x",),
    }  # fmt: skip
    assert {field: getattr(request, field) for field in given} == given


def test_several_answers_get_openais_temperature(client: openai.OpenAI, backend: FakeBackend) -> None:
    client.chat.completions.create(model=MODEL, messages=HI, n=2)
    assert backend.requests[-1].temperature == 1.0
    client.chat.completions.create(model=MODEL, messages=HI)
    assert backend.requests[-1].temperature is None


def test_a_stream_ends_with_its_usage() -> None:
    chunks = (Chunk("é", "", 5, 1, num_cached_tokens=4), Chunk("!", "stop", 5, 2, num_cached_tokens=4))
    with client_of(FakeBackend(chunks)) as client:
        options: Any = {"include_usage": True}
        stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True, stream_options=options)
        events = list(stream)
        assert text_of(events) == "é!"
        assert [event.usage for event in events[:-1]] == [None, None] and events[-1].choices == []
        usage = events[-1].usage
        assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (5, 2)
        assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens == 4
        whole = client.chat.completions.create(model=MODEL, messages=HI)
        assert whole.usage == usage
        ChatCompletion.model_validate(whole.model_dump(), strict=True)
        for event in events:
            ChatCompletionChunk.model_validate(event.model_dump(), strict=True)


def test_usage_is_not_lost_at_an_abort() -> None:
    """A stream that the server breaks off tells the tokens so far, and then the error."""
    backend = FakeBackend([Chunk("a", "", 5, 1)], error=RequestRejected("broken", "internal"))
    with gateway(backend) as url:
        body = {"model": MODEL, "messages": HI, "stream": True, "stream_options": {"include_usage": True}}
        lines = httpx.post(f"{url}/v1/chat/completions", json=body).text.split("\n\n")
    assert '"usage":{"prompt_tokens":5,"completion_tokens":1,"total_tokens":6' in lines[1]
    assert lines[2].startswith('data: {"error":{"message":') and lines[3] == "data: [DONE]"
    with client_of(backend) as client, pytest.raises(openai.APIError, match="failed to answer"):
        list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))


def test_an_error_before_the_first_token_has_a_status() -> None:
    backend = FakeBackend((), error=RequestRejected("max_tokens is 9, must be 1", "invalid"))
    with client_of(backend) as client:
        for stream in (True, False):
            with pytest.raises(openai.BadRequestError, match="max_tokens is 9"):
                client.chat.completions.create(model=MODEL, messages=HI, stream=stream)
        backend.error = ServerOverloaded("queue is full; retry later", "unavailable")
        with pytest.raises(openai.InternalServerError, match="queue is full") as caught:
            client.chat.completions.create(model=MODEL, messages=HI)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.NotFoundError, match="'another' does not exist"):
            client.chat.completions.create(model="another", messages=HI)


def test_log_probs_name_each_token_and_its_bytes() -> None:
    tops = ((TopLogProb(7, "a", -0.5), TopLogProb(8, "\ufffd", -1.0, b"\xc3")), (TopLogProb(9, "b", -0.1),))
    tokens = (Token(7, "a"), Token(8, "\ufffd", b"\xc3"))
    chunk = Chunk("a", "length", 5, 2, log_probs=(-0.5, -1.0), top_log_probs=tops, tokens=tokens)
    with client_of(FakeBackend([chunk])) as client:
        answer = client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2)
        rows = answer.choices[0].logprobs.content  # type: ignore[union-attr]
        assert rows is not None
        assert [(row.token, row.bytes, row.logprob) for row in rows] == [("a", [97], -0.5), ("\ufffd", [0xC3], -1.0)]
        assert [[top.token for top in row.top_logprobs] for row in rows] == [["a", "\ufffd"], ["b"]]
        events = list(client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, stream=True))
        assert events[0].choices[0].logprobs.content == rows  # type: ignore[union-attr]


@pytest.mark.slow
def test_tools_are_not_dropped_and_their_calls_stream() -> None:
    calls = [ToolCall(0, "call_1", "weather", '{"ci'), ToolCall(0, None, None, 'ty": "Köln"}')]
    chunks = [
        Chunk("", "", 5, 1, reasoning="Let me see"),
        *(Chunk("", "", 5, 2 + i, tool_calls=(call,)) for i, call in enumerate(calls)),
        Chunk("", "", 5, 4, tool_calls=(ToolCall(1, "call_2", "time", "{}"),)),
        Chunk("", "stop", 5, 5),
    ]
    backend = FakeBackend(chunks)
    with client_of(backend) as client:
        whole = client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER, TIME]).choices[0]
        told = backend.requests[-1].tools or ()
        assert [tool["function"]["name"] for tool in told] == ["weather", "time"]
        assert told[0] == WEATHER
        with client.chat.completions.stream(model=MODEL, messages=HI, tools=[WEATHER, TIME]) as stream:
            joined = stream.get_final_completion().choices[0]
        for choice in (whole, joined):
            assert choice.finish_reason == "tool_calls" and not choice.message.content
            got = [(c.id, c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]  # type: ignore[union-attr]
            assert got == [("call_1", "weather", '{"city": "Köln"}'), ("call_2", "time", "{}")]
        assert whole.message.reasoning_content == "Let me see"  # type: ignore[attr-defined]
        # The answer is the next request's history, as the client writes it.
        history: Any = [*HI, whole.message, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
        client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER, TIME])
        turns = backend.requests[-1].messages or ()
        assert turns[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Köln"}'  # type: ignore[index]
        assert turns[2]["tool_call_id"] == "call_1"  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2, 7, 100])
def test_a_demanded_call_is_guided_and_streams_as_a_call(cut: int) -> None:
    text = ' { "name" : "weather", "arguments": {"city": "}é"} } '
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    chunks = [Chunk(piece, "", 5, i) for i, piece in enumerate(pieces, 1)] + [Chunk("", "stop", 5, 99)]
    backend = FakeBackend(chunks)
    with client_of(backend) as client:
        with client.chat.completions.stream(
            model=MODEL, messages=HI, tools=[WEATHER, TIME], tool_choice="required"
        ) as stream:
            streamed = stream.get_final_completion().choices[0]
        whole = client.chat.completions.create(
            model=MODEL, messages=HI, tools=[WEATHER, TIME], tool_choice="required"
        ).choices[0]
        assert backend.requests[-1].guide_type == "json_schema"
        for choice in (streamed, whole):
            assert choice.finish_reason == "tool_calls" and not choice.message.content
            calls: Any = choice.message.tool_calls
            (call,) = calls
            assert (call.function.name, call.function.arguments) == ("weather", '{"city": "}é"}')


def test_a_named_tool_is_called_with_its_own_arguments() -> None:
    backend = FakeBackend([Chunk('{"city": ', "", 5, 1), Chunk('"Rome"}', "stop", 5, 2)])
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    with client_of(backend) as client:
        answer = client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER, TIME], tool_choice=choice)
        calls: Any = answer.choices[0].message.tool_calls
        (call,) = calls
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')
        allowed: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [choice]}}
        client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER, TIME], tool_choice=allowed)
        assert [tool["function"]["name"] for tool in backend.requests[-1].tools or ()] == ["weather"]
        client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER, TIME], tool_choice="none")
        assert backend.requests[-1].tools is None


@pytest.mark.slow
def test_the_asyncio_client_streams_many_at_once() -> None:
    async def main(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def ask() -> str:
                events = [e async for e in await client.chat.completions.create(model=MODEL, messages=HI, stream=True)]
                return text_of(events)

            return await asyncio.gather(*(ask() for _ in range(20)))

    with gateway(FakeBackend(pause_s=0.02)) as url:
        assert asyncio.run(main(url)) == ["Hello"] * 20


@pytest.mark.slow
def test_a_silent_stream_is_kept_open_by_comments() -> None:
    """A comment line breaks no reader of OpenAI's."""
    backend = FakeBackend(pause_s=0.3)
    with gateway(backend, heartbeat_s=0.1) as url:
        body = {"model": MODEL, "messages": HI, "stream": True}
        assert ": heartbeat\n\n" in httpx.post(f"{url}/v1/chat/completions", json=body).text
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            assert text_of(list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))) == "Hello"
