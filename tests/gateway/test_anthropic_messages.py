"""`/v1/messages` as Anthropic's own client sees it, in front of answers that the test writes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from deepseek_triton.clients import Chunk, RequestRejected, ServerOverloaded, ToolCall
from tests.support.gateway import MODEL, FakeBackend, gateway
from tests.support.lazy import lazy
from tests.support.waiting import until

if TYPE_CHECKING:
    import anthropic
else:
    anthropic = lazy("anthropic")  # two seconds of each worker that runs none of these tests

HI: Any = [{"role": "user", "content": "Hello"}]
SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"name": "weather", "description": "The weather of a city", "input_schema": SCHEMA}
THOUGHT = (
    Chunk("", "", 9, 1, reasoning="Let me ", num_cached_tokens=4, num_reasoning_tokens=1),
    Chunk("", "", 9, 2, reasoning="see.", num_cached_tokens=4, num_reasoning_tokens=2),
    Chunk("Grüße, 世", "", 9, 3, num_cached_tokens=4, num_reasoning_tokens=2),
    Chunk("界", "", 9, 4, num_cached_tokens=4, num_reasoning_tokens=2),
)
CALLED = (
    Chunk("", "", 9, 5, tool_calls=(ToolCall(0, "call_1", "weather", '{"city": "Pa'),)),
    Chunk("", "", 9, 6, tool_calls=(ToolCall(0, None, None, 'ris"}'),)),
    Chunk("", "stop", 9, 7, tool_calls=(ToolCall(1, "call_2", "weather", '{"city": "Rome"}'),), num_cached_tokens=4),
)
ENDED = (*THOUGHT, Chunk("", "stop", 9, 5, num_cached_tokens=4, num_reasoning_tokens=2))


@contextlib.contextmanager
def client_of(backend: FakeBackend) -> Iterator[anthropic.Anthropic]:
    with gateway(backend) as url, anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend(ENDED)


@pytest.fixture(scope="module")
def client(backend: FakeBackend) -> Iterator[anthropic.Anthropic]:
    with client_of(backend) as client:
        yield client


def create(client: anthropic.Anthropic, **options: Any) -> Any:
    return client.messages.create(**{"model": MODEL, "messages": HI, "max_tokens": 30, **options})


def stream(client: anthropic.Anthropic, **options: Any) -> tuple[list[Any], Any]:
    """The events, and the message that the client makes of them."""
    with client.messages.stream(**{"model": MODEL, "messages": HI, "max_tokens": 30, **options}) as events:
        return list(events), events.get_final_message()


def blocks_of(message: Any) -> list[dict[str, Any]]:
    kept = ("type", "text", "thinking", "name", "input")
    return [{key: block.to_dict()[key] for key in kept if key in block.to_dict()} for block in message.content]


@pytest.mark.slow
def test_thinking_and_text_come_as_blocks_whole_and_streamed(client: anthropic.Anthropic) -> None:
    whole, (events, streamed) = create(client), stream(client)
    assert whole.content[0].signature == ""
    for message in (whole, streamed):
        assert blocks_of(message) == [
            {"type": "thinking", "thinking": "Let me see."},
            {"type": "text", "text": "Grüße, 世界"},
        ]
        assert (message.stop_reason, message.model, message.role) == ("end_turn", MODEL, "assistant")
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (5, 4, 5)
        assert usage.output_tokens_details.thinking_tokens == 2
    names = [event.type for event in events if event.type not in ("text", "thinking")]
    block = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    assert names == ["message_start", *block, *block, "message_delta", "message_stop"]


def test_tool_calls_come_as_blocks_whole_and_streamed() -> None:
    with client_of(FakeBackend((*THOUGHT, *CALLED))) as client:
        whole, (_, streamed) = create(client, tools=[WEATHER]), stream(client, tools=[WEATHER])
    for message in (whole, streamed):
        assert blocks_of(message)[2:] == [
            {"type": "tool_use", "name": "weather", "input": {"city": "Paris"}},
            {"type": "tool_use", "name": "weather", "input": {"city": "Rome"}},
        ]
        assert message.stop_reason == "tool_use"


def test_a_call_that_is_demanded_is_guided_and_read() -> None:
    backend = FakeBackend((Chunk('{"city": ', "", 9, 1), Chunk('"Rome"}', "stop", 9, 2)))
    options: Any = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}}
    with client_of(backend) as client:
        for message in (create(client, **options), stream(client, **options)[1]):
            assert blocks_of(message) == [{"type": "tool_use", "name": "weather", "input": {"city": "Rome"}}]
            assert message.stop_reason == "tool_use"
    assert (backend.requests[0].guide_type, json.loads(str(backend.requests[0].guide))) == ("json_schema", SCHEMA)


def test_a_call_that_is_cut_off_says_so() -> None:
    with client_of(FakeBackend((CALLED[0], Chunk("", "length", 9, 6)))) as client:
        for message in (create(client, tools=[WEATHER]), stream(client, tools=[WEATHER])[1]):
            assert message.stop_reason == "max_tokens"


def test_every_option_reaches_the_model(client: anthropic.Anthropic, backend: FakeBackend) -> None:
    create(
        client,
        system=[{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}],
        stop_sequences=["a", "b"],
        metadata={"user_id": "me"},
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
        extra_body={"temperature": 0.5, "top_k": 4, "top_p": 0.9},
        extra_headers={"X-Request-Id": "my-request"},
    )
    assert backend.calls[-1].request_id == "my-request"
    given = {
        "stop_words": ("a", "b"), "thinking_token_budget": 1024, "guide_type": "json_schema", "temperature": 0.5,
        "top_k": 4, "top_p": 0.9, "max_tokens": 30,
    }  # fmt: skip
    assert {name: getattr(backend.requests[-1], name) for name in given} == given


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, None),
        ({"thinking": {"type": "disabled"}}, 0),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, 1024),
        ({"output_config": {"effort": "max"}}, None),
    ],
)
def test_thinking_becomes_a_budget(
    client: anthropic.Anthropic, backend: FakeBackend, options: Any, budget: int | None
) -> None:
    create(client, **options)
    assert backend.requests[-1].thinking_token_budget == budget


def test_a_conversation_becomes_the_templates_messages(client: anthropic.Anthropic, backend: FakeBackend) -> None:
    first = create(client).to_dict()["content"]  # a client sends an answer's blocks back as they are
    call = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "rain"}]}
    failed = {"type": "tool_result", "tool_use_id": "call_2", "content": "no such city", "is_error": True}
    turns = [
        *HI,
        {"role": "assistant", "content": [*first, call]},
        {"role": "user", "content": [result, failed, {"type": "text", "text": "And?"}]},
    ]
    create(client, system="Be brief", messages=turns, tools=[WEATHER])
    sent = [dict(turn) if isinstance(turn, dict) else vars(turn) for turn in backend.requests[-1].messages or ()]
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert sent == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": "Grüße, 世界",
            "reasoning_content": "Let me see.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": "Error: no such city"},
        {"role": "user", "content": "And?"},
    ]
    (tool,) = backend.requests[-1].tools or ()
    assert tool["function"] == {"name": "weather", "description": "The weather of a city", "parameters": SCHEMA}


def test_tokens_are_counted(client: anthropic.Anthropic, backend: FakeBackend) -> None:
    count = client.messages.count_tokens(model=MODEL, messages=HI, system="Be brief", tools=[WEATHER])
    assert count.input_tokens == 9
    assert backend.requests[-1].max_tokens == 1 and backend.requests[-1].tools


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"unknown": 1}, "unknown"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, r"messages\[0\].content\[0\]"),
        ({"messages": [*HI, {"role": "assistant", "content": "I"}]}, "messages must not end"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\]"),
        ({"tool_choice": {"type": "any"}}, "tool_choice must come with tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "time"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "name"),
        ({"tools": [WEATHER, WEATHER]}, "different names"),
        ({"tools": [WEATHER], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "parallel"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "display"),
        ({"container": "x"}, "container"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"stop_sequences": [""]}, "stop"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: anthropic.Anthropic, options: Any, named: str) -> None:
    body = {"model": MODEL, "messages": HI, "max_tokens": 9, **options}
    with pytest.raises(anthropic.BadRequestError, match=named) as caught:
        client.post("/v1/messages", body=body, cast_to=object)
    body = caught.value.body  # type: ignore[assignment]
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")


@pytest.mark.parametrize(
    ("error", "expected", "kind"),
    [
        (ServerOverloaded("queue is full"), "InternalServerError", "overloaded_error"),
        (RequestRejected("prompt is too long", "invalid"), "BadRequestError", "invalid_request_error"),
    ],
)
def test_errors_have_anthropics_form(error: Exception, expected: str, kind: str) -> None:
    with client_of(FakeBackend((), error=error)) as client, pytest.raises(getattr(anthropic, expected)) as caught:
        create(client)
    assert caught.value.body["error"]["type"] == kind


def test_an_unknown_model_is_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        create(client, model="another")


def test_a_stream_that_breaks_tells_its_tokens_and_the_error() -> None:
    with gateway(FakeBackend(THOUGHT, error=ServerOverloaded("queue is full"))) as url:
        body = {"model": MODEL, "messages": HI, "max_tokens": 9, "stream": True}
        events = httpx.post(f"{url}/v1/messages", json=body).text.strip().split("\n\n")
    names, data = zip(*(event.split("\n", 1) for event in events[-2:]), strict=True)
    usage, error = (json.loads(line.removeprefix("data: ")) for line in data)
    assert names == ("event: message_delta", "event: error")
    assert usage["usage"]["output_tokens"] == 4 and error["error"]["type"] == "overloaded_error"
    with (
        client_of(FakeBackend(THOUGHT, error=ServerOverloaded("queue is full"))) as client,
        pytest.raises(anthropic.APIStatusError, match="queue is full"),
    ):
        stream(client)


def test_the_request_id_is_where_the_client_looks_for_it(client: anthropic.Anthropic) -> None:
    assert create(client, extra_headers={"X-Request-Id": "mine"})._request_id == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_ends_its_request(is_streamed: bool) -> None:
    backend = FakeBackend(ENDED * 100, pause_s=0.05)

    async def leave(url: str) -> None:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
            create: Any = client.messages.create(model=MODEL, messages=HI, max_tokens=9, stream=is_streamed)
            asked = asyncio.ensure_future(create)
            await asyncio.to_thread(until, lambda: backend.running)
            if is_streamed:
                await (await asked).close()
            else:
                asked.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asked
            await asyncio.to_thread(until, lambda: (backend.running, backend.cancelled) == (0, 1))

    with gateway(backend) as url:
        asyncio.run(leave(url))
