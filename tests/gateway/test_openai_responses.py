"""`/v1/responses` as OpenAI's own client sees it, in front of answers that the test writes."""

from __future__ import annotations

import time
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, response_create_params
from pydantic import BaseModel

from deepseek_triton.clients import Chunk, RequestRejected, Token, ToolCall
from deepseek_triton.gateway.apis.openai_responses.body import ResponseBody
from tests.support.gateway import MODEL, FakeBackend, client_of, gateway

WEATHER: Any = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
STRICT: Any = {**WEATHER, "strict": True}
TIME: Any = {"type": "function", "name": "time", "description": "The time"}
FULL = (
    Chunk("", "", 5, 1, reasoning="Let me "),
    Chunk("", "", 5, 2, reasoning="see"),
    Chunk("I'll ", "", 5, 3),
    Chunk("ask", "", 5, 4),
    Chunk("", "", 5, 5, tool_calls=(ToolCall(0, "call_1", "weather", '{"a'),)),
    Chunk("", "", 5, 6, tool_calls=(ToolCall(0, None, None, '": 1}'), ToolCall(1, "call_2", "time", "{}"))),
    Chunk("", "stop", 5, 7, num_cached_tokens=4, num_reasoning_tokens=2),
)


def test_every_field_of_openais_client_is_known() -> None:
    fields = {*response_create_params.ResponseCreateParamsBase.__annotations__, "stream"}
    assert fields <= {*ResponseBody.model_fields, *ResponseBody.NOT_SUPPORTED}


def test_a_whole_response_has_an_item_for_each_part() -> None:
    with client_of(FakeBackend(FULL)) as client:
        response: Any = client.responses.create(model=MODEL, input="Hello", tools=[WEATHER, TIME])
        Response.model_validate(response.model_dump(), strict=True)
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output_text == "I'll ask" and response.status == "completed"
    reasoning, _, first, second = response.output
    assert reasoning.content[0].text == "Let me see"
    assert (first.name, first.call_id, first.arguments) == ("weather", "call_1", '{"a": 1}')
    assert (second.name, second.arguments) == ("time", "{}")
    usage = response.usage
    assert usage is not None and (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (5, 7, 12)
    assert usage.input_tokens_details.cached_tokens == 4 and usage.output_tokens_details.reasoning_tokens == 2


@pytest.mark.slow
def test_a_stream_has_every_event_in_its_order() -> None:
    with client_of(FakeBackend(FULL)) as client:
        whole: Any = client.responses.create(model=MODEL, input="Hello", tools=[WEATHER, TIME])
        events: list[Any] = list(
            client.responses.create(model=MODEL, input="Hello", tools=[WEATHER, TIME], stream=True)
        )
        with client.responses.stream(model=MODEL, input="Hello", tools=[STRICT]) as stream:
            joined: Any = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        type(event).model_validate(event.model_dump(), strict=True)
    kinds = [event.type.removeprefix("response.") for event in events]
    text = ["output_item.added", "content_part.added", *["{}.delta"] * 2, "{}.done", "content_part.done"]
    expected = ["created", "in_progress"]
    for part in ("reasoning_text", "output_text"):
        expected += [*(kind.format(part) for kind in text), "output_item.done"]
    for num_deltas in (2, 1):
        expected += ["output_item.added", *["function_call_arguments.delta"] * num_deltas]
        expected += ["function_call_arguments.done", "output_item.done"]
    assert kinds == [*expected, "completed"]

    def shown(response: Any) -> list[dict[str, Any]]:
        drop = {"id", "parsed", "parsed_arguments"}
        return [{k: v for k, v in item.model_dump(exclude_none=True).items() if k not in drop} for item in response]

    assert shown(events[-1].response.output) == shown(whole.output)
    assert joined.output_text == "I'll ask" and joined.output[2].arguments == '{"a": 1}'


@pytest.mark.slow
def test_what_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    with client_of(FakeBackend([Chunk("Hel", "length", 5, 1)])) as cut:
        response: Any = cut.responses.create(model=MODEL, input="x", max_output_tokens=1)
        assert response.status == "incomplete" and response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert list(cut.responses.create(model=MODEL, input="x", stream=True))[-1].type == "response.incomplete"
    with client_of(FakeBackend([Chunk("", "stop", 5, 0)])) as empty:
        assert empty.responses.create(model=MODEL, input="x").output_text == ""


@pytest.mark.slow
def test_an_answer_that_breaks_off_has_failed_with_its_usage() -> None:
    backend = FakeBackend([Chunk("a", "", 5, 1)], error=RequestRejected("broken", "internal"))
    with client_of(backend) as client:
        events: list[Any] = list(client.responses.create(model=MODEL, input="x", stream=True))
        response: Any = events[-1].response
        assert events[-1].type == "response.failed" and response.usage.output_tokens == 1
        assert response.error.code == "server_error" and response.output[0].content[0].text == "a"
        with pytest.raises(openai.InternalServerError, match="failed to answer"):
            client.responses.create(model=MODEL, input="x")
        backend.chunks, backend.error = (), RequestRejected("the prompt is too long", "invalid")
        for stream in (True, False):
            with pytest.raises(openai.BadRequestError, match="too long"):
                client.responses.create(model=MODEL, input="x", stream=stream)


def test_options_and_items_reach_the_model(client: openai.OpenAI, backend: FakeBackend) -> None:
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "One"}, {"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": "Sure", "id": "msg_1", "status": "completed"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"role": "developer", "content": "Be brief"},
    ]
    client.responses.create(
        model=MODEL, input=items, instructions="You help", max_output_tokens=9, temperature=0.5, top_p=0.5,
        reasoning={"effort": "none"}, tools=[WEATHER, TIME], tool_choice={"type": "function", "name": "time"},
        metadata={"a": "b"}, extra_body={"seed": 3, "stop": "x"},
    )  # fmt: skip
    request = backend.requests[-1]
    turns: Any = [turn if isinstance(turn, dict) else vars(turn) for turn in request.messages or ()]
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    assert turns == [
        {"role": "system", "content": "You help"},
        {"role": "user", "content": "One\ntwo"},
        {"role": "assistant", "content": "Sure", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "system", "content": "Be brief"},
    ]
    assert (request.max_tokens, request.temperature, request.seed, request.thinking_token_budget) == (9, 0.5, 3, 0)
    assert request.guide_type == "json_schema" and len(request.tools or ()) == 2 and request.stop_words == ("x",)


class Answer(BaseModel):
    word: str


def test_structured_outputs_are_parsed() -> None:
    backend = FakeBackend([Chunk('{"word": "hi"}', "stop", 5, 3)])
    with client_of(backend) as client:
        response = client.responses.parse(model=MODEL, input="x", text_format=Answer)
        assert response.output_parsed == Answer(word="hi")
        assert backend.requests[-1].guide_type == "json_schema"


def test_log_probs_belong_to_the_text() -> None:
    tokens = tuple(Token(i, text) for i, text in enumerate(("hm", "</think>", "a", "b")))
    chunk = Chunk("ab", "stop", 5, 4, reasoning="hm", log_probs=(-0.1, -0.2, -0.3, -0.4), tokens=tokens)
    with client_of(FakeBackend([chunk])) as client:
        response: Any = client.responses.create(model=MODEL, input="x", include=["message.output_text.logprobs"])
        rows = response.output[1].content[0].logprobs
        assert [(row.token, row.logprob) for row in rows] == [("a", -0.3), ("b", -0.4)]


@pytest.mark.slow
def test_a_response_is_kept_continued_and_deleted(client: openai.OpenAI, backend: FakeBackend) -> None:
    first = client.responses.create(model=MODEL, input="Hello", instructions="Only now")
    assert client.responses.retrieve(first.id).output_text == "Hello"
    second = client.responses.create(model=MODEL, input="Again", previous_response_id=first.id)
    told: Any = backend.requests[-1].messages
    turns = [turn.content for turn in told]
    assert turns == ["Hello", "Hello", "Again"]
    list(client.responses.create(model=MODEL, input="More", previous_response_id=second.id, stream=True))
    assert len(backend.requests[-1].messages or ()) == 5
    listed: Any = client.responses.input_items.list(first.id).data
    assert [item.content[0].text for item in listed] == ["Hello"]
    client.responses.delete(first.id)
    unkept = client.responses.create(model=MODEL, input="x", store=False)
    for gone in (first.id, unkept.id, "resp_none"):
        with pytest.raises(openai.NotFoundError, match=gone):
            client.responses.retrieve(gone)
        with pytest.raises(openai.BadRequestError, match="no longer, kept"):
            client.responses.create(model=MODEL, input="x", previous_response_id=gone)
    with pytest.raises(openai.BadRequestError, match="only a response with background"):
        client.responses.cancel(second.id)


@pytest.mark.slow
def test_a_background_response_is_polled_and_cancelled() -> None:
    backend = FakeBackend([Chunk("a", "", 5, 1), Chunk("b", "stop", 5, 2)], pause_s=0.2)
    with client_of(backend) as client:
        begun = client.responses.create(model=MODEL, input="x", background=True)
        assert begun.status == "in_progress"
        with pytest.raises(openai.BadRequestError, match="still computed"):
            client.responses.create(model=MODEL, input="x", previous_response_id=begun.id)
        while (response := client.responses.retrieve(begun.id)).status == "in_progress":
            time.sleep(0.02)
        assert (response.status, response.output_text) == ("completed", "ab")
        assert client.responses.cancel(begun.id).status == "completed"
        begun = client.responses.create(model=MODEL, input="x", background=True)
        while not backend.running:
            time.sleep(0.01)
        cancelled = client.responses.cancel(begun.id)
        assert cancelled.status == "cancelled" and backend.running == 0 and backend.cancelled == 1
        assert cancelled.usage is not None and client.responses.retrieve(begun.id).status == "cancelled"
        backend.error = RequestRejected("broken", "internal")
        begun = client.responses.create(model=MODEL, input="x", background=True)
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.responses.create(model="another", input="x", background=True)


def test_only_so_many_are_computed_in_the_background() -> None:
    with gateway(FakeBackend(pause_s=5), max_background_responses=1) as url:
        body = {"model": MODEL, "input": "x", "background": True}
        statuses = [httpx.post(f"{url}/v1/responses", json=body).status_code for _ in range(2)]
    assert statuses == [200, 429]


def test_the_oldest_responses_go_first() -> None:
    with gateway(FakeBackend(), response_store_bytes=4000) as url, httpx.Client(base_url=url) as client:
        made = [client.post("/v1/responses", json={"model": MODEL, "input": "x"}).json()["id"] for _ in range(10)]
        statuses = [client.get(f"/v1/responses/{name}").status_code for name in made]
    assert statuses[0] == 404 and statuses[-1] == 200 and statuses == sorted(statuses, reverse=True)


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [fields]}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"input": None}, "input", "valid string"),
        ({"input": []}, "input", "at least 1 item"),
        (item(type="file_search_call", id="x"), "input[0]", "'file_search_call' are not supported"),
        (item(type="item_reference", id="x"), "input[0]", "'item_reference' are not supported"),
        (item(role="user", content=[{"type": "input_image"}]), "input[0].content[0].type", "'input_image'"),
        (item(role="user", content="x", nam=1), "input[0].nam", "unknown field"),
        (item(type="function_call_output", output="x"), "input[0].call_id", "is required"),
        (item(type="reasoning", encrypted_content="x"), "input[0].encrypted_content", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
        ({"tools": [TIME], "tool_choice": {"type": "mcp"}}, "tool_choice.type", "'mcp'"),
        ({"tool_choice": "required"}, "tool_choice", "must come with tools"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]", "'reasoning.encrypted_content'"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"prompt": {"id": "x"}}, "prompt", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported, except as 'disabled'"),
        ({"max_tool_calls": 3}, "max_tool_calls", "not supported"),
        ({"service_tier": "flex"}, "service_tier", "not supported"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "not supported"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'xml'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "is required"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"top_logprobs": 3}, "top_logprobs", "include"),
        ({"background": True, "stream": True}, "background", "with stream"),
        ({"background": True, "store": False}, "store", "with background"),
        ({"stream_options": {}}, "stream_options", "stream: true"),
        ({"max_tokens": 5}, "max_tokens", "unknown field 'max_tokens'"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "no longer, kept"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_is_refused_by_name(client: openai.OpenAI, change: dict[str, Any], param: str, message: str) -> None:
    answer = httpx.post(f"{client.base_url}responses", json={"model": MODEL, "input": "x", **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"]


def test_several_workers_keep_nothing_and_say_so() -> None:
    with gateway(FakeBackend(), workers=2) as url, httpx.Client(base_url=url) as client:
        for name, value in (("background", True), ("previous_response_id", "x"), ("store", True)):
            answer = client.post("/v1/responses", json={"model": MODEL, "input": "x", name: value})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == name
        assert client.post("/v1/responses", json={"model": MODEL, "input": "x"}).json()["store"] is False
