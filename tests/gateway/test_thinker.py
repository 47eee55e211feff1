"""A real tritonserver behind the gateway, with a tiny model that reasons and knows tools: the whole way of each option,
and of a client that leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.gateway.conftest import MAX_SEQ_LEN, THINKER
from tests.gateway.test_openai_chat import TIME, WEATHER
from tests.support.gateway import gateway
from tests.support.lazy import lazy
from tests.support.serving import PUBLISH_S, metrics, wait_until

if TYPE_CHECKING:
    import anthropic
else:
    anthropic = lazy("anthropic")  # two seconds of each worker that runs none of these tests

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("gateway thinker")]

HI: Any = [{"role": "user", "content": "Hello"}]
# Of `/v1/messages`: an answer that ends late. No thought comes before it, for the schema doesn't bind that one.
LONG: Any = {
    "thinking": {"type": "disabled"},
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "string", "minLength": MAX_SEQ_LEN - 148}}},
}
LEFT_S = 1.0 + PUBLISH_S  # a second, and the interval in which the server publishes its slots


@pytest.fixture(scope="module")
def url(thinker: TritonServer) -> Iterator[str]:
    with gateway(backend_urls=(thinker.grpc_url,), models=(THINKER,)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def create(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": THINKER, "messages": HI, "max_tokens": 30, **options})


def test_the_model_is_there(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [THINKER]


def test_reasoning_comes_apart_and_an_effort_bounds_it(client: openai.OpenAI) -> None:
    answer = create(client, extra_body={"thinking_token_budget": 5})
    message, usage = answer.choices[0].message, answer.usage
    assert message.reasoning_content and message.content
    assert usage.completion_tokens_details.reasoning_tokens == 5
    assert not getattr(create(client, reasoning_effort="none").choices[0].message, "reasoning_content", None)
    unbound = create(client, reasoning_effort="xhigh")
    assert not unbound.choices[0].message.content
    assert unbound.usage.completion_tokens_details.reasoning_tokens == 30


def test_streams_and_whole_answers_agree(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "seed": 7, "temperature": 1.0, "n": 2}
    options["extra_body"] = {"thinking_token_budget": 5}
    whole = create(client, **options)
    events = list(create(client, **options, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        parts = [part for event in events for part in event.choices if part.index == choice.index]
        assert choice.message.content == "".join(part.delta.content or "" for part in parts)
        rows = choice.logprobs.content
        assert [row.token for row in rows] == [row.token for part in parts for row in part.logprobs.content]
        assert len(rows) <= 30 and [len(row.top_logprobs) for row in rows] == [2] * len(rows)
        assert b"".join(bytes(row.bytes) for row in rows)
        assert parts[-1].finish_reason == choice.finish_reason
    usages = [(usage.prompt_tokens, usage.completion_tokens) for usage in (whole.usage, events[-1].usage)]
    assert usages[0] == usages[1]


def test_a_prompt_that_came_before_is_counted_as_cached(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "A long beginning. " * 10}]
    create(client, messages=long)
    again = create(client, messages=long)
    assert again.usage.prompt_tokens - 1 == again.usage.prompt_tokens_details.cached_tokens


SHORT: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}},
    "required": ["city"],
    "additionalProperties": False,
}


class Answer(BaseModel):
    is_blue: bool


def test_structured_outputs_are_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=THINKER, messages=HI, response_format=Answer, reasoning_effort="none", max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Answer)
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
    text = create(client, response_format=form, reasoning_effort="minimal", max_tokens=400).choices[0].message.content
    assert json.loads(text) in ("a", "b")


@pytest.mark.parametrize("tools", [[WEATHER], [TIME], [TIME, WEATHER]], ids=len)
def test_a_call_that_is_demanded_comes(client: openai.OpenAI, tools: list[Any]) -> None:
    bounded = [json.loads(json.dumps(tool)) for tool in tools]
    for tool in bounded:
        for schema in tool["function"].get("parameters", {}).get("properties", {}).values():
            schema["maxLength"] = 5
    options: Any = {"tools": bounded, "tool_choice": "required", "reasoning_effort": "none", "max_tokens": 300}
    whole = create(client, **options).choices[0]
    with client.chat.completions.stream(model=THINKER, messages=HI, **options) as stream:
        streamed: Any = stream.get_final_completion().choices[0]
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    calls = [choice.message.tool_calls[0].function for choice in (whole, streamed)]
    assert (calls[0].name, calls[0].arguments) == (calls[1].name, calls[1].arguments)
    names = [tool["function"]["name"] for tool in tools]
    assert calls[0].name in names
    arguments = json.loads(calls[0].arguments)
    assert set(arguments) == ({"city"} if calls[0].name == "weather" else set())


def test_responses_reason_call_and_go_on(client: openai.OpenAI) -> None:
    options: Any = {"model": THINKER, "max_output_tokens": 300}
    tool: Any = {"type": "function", "name": "time", "strict": True}
    first: Any = client.responses.create(
        **options, input="Hello", tools=[tool], tool_choice="required", reasoning={"effort": "none"}
    )
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("time", {})
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    second: Any = client.responses.create(
        **{**options, "max_output_tokens": 20}, input=[output], previous_response_id=first.id, tools=[tool],
    )  # fmt: skip
    assert second.status == "incomplete" and second.usage is not None
    assert second.output[0].type == "reasoning" and second.usage.input_tokens > (first.usage.input_tokens or 0)
    parsed: Any = client.responses.parse(**options, input="x", text_format=Answer, reasoning={"effort": "none"})
    assert isinstance(parsed.output_parsed, Answer)
    events = list(client.responses.create(**{**options, "max_output_tokens": 20}, input="Hello", stream=True))
    assert events[-1].type == "response.incomplete"


def test_anthropics_client_thinks_calls_and_counts(url: str) -> None:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as asker:
        bounded: Any = {"type": "enabled", "budget_tokens": 5}
        options: Any = {"model": THINKER, "messages": HI, "max_tokens": 30, "thinking": bounded}
        whole = asker.messages.create(**options)
        with asker.messages.stream(**options) as stream:
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            assert [block.type for block in message.content] == ["thinking", "text"]
            assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 30
        assert whole.content[1].to_dict() == streamed.content[1].to_dict()
        tool: Any = {"name": "weather", "input_schema": SHORT}
        options |= {
            "max_tokens": 300,
            "thinking": {"type": "disabled"},
            "tools": [tool],
            "tool_choice": {"type": "any"},
        }
        with asker.messages.stream(**options) as stream:
            called: Any = stream.get_final_message()
        (block,) = called.content
        assert (called.stop_reason, block.name, set(block.input)) == ("tool_use", "weather", {"city"})
        count = asker.messages.count_tokens(model=THINKER, messages=HI)
        assert count.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


@pytest.mark.timed
def test_a_cancelled_background_response_frees_its_slot(client: openai.OpenAI, thinker: TritonServer) -> None:
    begun = client.responses.create(
        model=THINKER, input="Hello", background=True, extra_body={"min_tokens": MAX_SEQ_LEN - 148}
    )
    wait_until(thinker, 20, model=THINKER, slots_used=1)
    assert client.responses.cancel(begun.id).status == "cancelled"
    wait_until(thinker, LEFT_S, model=THINKER, slots_used=0)


def test_what_the_server_refuses_is_the_clients_fault(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt"):
        create(client, messages=[{"role": "user", "content": "x" * (MAX_SEQ_LEN + 100)}])
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError):
        create(client, response_format=form)


@pytest.mark.timed
@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_a_client_that_leaves_frees_its_slot_within_a_second(
    thinker: TritonServer, url: str, path: str, is_streamed: bool
) -> None:
    """Triton's own HTTP `generate` can't see that its client has gone."""
    cancelled = metrics(thinker, THINKER)["requests_cancelled_total"]
    asked: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": HI},
        "completions": {"prompt": "Hello", "max_tokens": MAX_SEQ_LEN - 98},
        "responses": {"input": "Hello"},
    }
    body = {"model": THINKER, "stream": is_streamed, "min_tokens": MAX_SEQ_LEN - 148, **asked.get(path, {})}
    if path == "messages":  # which knows no min_tokens: the schema keeps the answer long
        body = {"model": THINKER, "stream": is_streamed, "messages": HI, "max_tokens": MAX_SEQ_LEN - 98, **LONG}
    with httpx.Client(timeout=httpx.Timeout(60, read=None if is_streamed else 0.5)) as client:
        if is_streamed:
            with client.stream("POST", f"{url}/v1/{path}", json=body) as response:
                pieces = response.iter_bytes()
                for _ in range(3):
                    next(pieces)
        else:
            with pytest.raises(httpx.ReadTimeout):
                pytest.fail(client.post(f"{url}/v1/{path}", json=body).text)
    wait_until(thinker, LEFT_S, model=THINKER, requests_cancelled_total=cancelled + 1, slots_used=0)
