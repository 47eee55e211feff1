from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from deepseek_triton.clients.api import GenerateRequest, Message
from deepseek_triton.ensemble.protocol import contract

WRONG: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", 2**31),
    ("max_tokens", 1.0),
    ("max_tokens", True),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 1e39),  # finite here, not in FP32
    ("temperature", "hot"),
    ("top_k", -1),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("seed", -1),
    ("seed", 2**64),
    ("min_tokens", -1),
    ("min_p", 1.1),
    ("min_p", math.nan),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", 10**400),  # too large for a float
    ("presence_penalty", -math.inf),
    ("presence_penalty", math.nan),
    ("frequency_penalty", 1e39),
    ("frequency_penalty", "1"),
    ("end_id", -2),
    ("num_return_sequences", 0),
    ("num_return_sequences", 2.0),
    ("num_return_sequences", 65),
    ("thinking_token_budget", -1),
    ("num_top_log_probs", True),
    ("num_top_log_probs", 21),
    ("priority", -1),
    ("queue_timeout_ms", 2**31),
    ("timeout_ms", 0.5),
    ("separate_reasoning", 1),
    ("return_log_probs", "yes"),
    ("return_perf_metrics", 0),
    ("stop_words", "one"),
    ("stop_words", ["a", ""]),
    ("bad_words", {"a"}),
    ("guide_type", "xml"),
]
RIGHT: list[tuple[str, Any]] = [
    ("max_tokens", 1),
    ("max_tokens", 2**31 - 1),
    ("temperature", 0),
    ("temperature", 3.4e38),
    ("top_k", 0),
    ("top_p", 1),
    ("top_p", 1e-6),
    ("seed", 0),
    ("seed", 2**64 - 1),
    ("min_tokens", 0),
    ("min_p", 0),
    ("min_p", 1),
    ("repetition_penalty", 1e-6),
    ("presence_penalty", -3.4e38),
    ("frequency_penalty", -2),
    ("end_id", -1),
    ("num_return_sequences", 1),
    ("num_return_sequences", 64),
    ("thinking_token_budget", 0),
    ("num_top_log_probs", 0),
    ("num_top_log_probs", 20),
    ("priority", 0),
    ("queue_timeout_ms", 0),
    ("timeout_ms", 2**31 - 1),
    ("separate_reasoning", False),
    ("return_log_probs", True),
    ("return_perf_metrics", True),
    ("stop_words", ()),
    ("bad_words", ("a", " ")),
]
# Everything that a request can ask for, with values that the server's defaults aren't.
FULL: dict[str, Any] = {
    "max_tokens": 9, "min_tokens": 2, "temperature": 1, "top_k": 1, "top_p": 1, "min_p": 1, "seed": 1,
    "repetition_penalty": 1, "presence_penalty": 1, "frequency_penalty": 1, "stop_words": ["a"], "bad_words": ["b"],
    "end_id": 1, "num_return_sequences": 1, "guide_type": "regex", "guide": "a+", "thinking_token_budget": 1,
    "separate_reasoning": True, "exclude_input_in_output": False, "return_log_probs": True, "num_top_log_probs": 1,
    "return_perf_metrics": True, "priority": 1, "queue_timeout_ms": 1, "timeout_ms": 1,
}  # fmt: skip
# The server fills no tensor in for pad_id, and the counts of tokens are what the clients count by.
NEVER_SENT = {
    contract.OPTIONS["pad_id"],
    contract.OPTIONS["return_num_input_tokens"],
    contract.OPTIONS["return_num_output_tokens"],
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def messages_sent(request: GenerateRequest) -> Any:
    text = request.to_tensors(stream=False)[contract.MESSAGES]
    assert isinstance(text, str)
    return json.loads(text)


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_option_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must .*got {re.escape(repr(value))}$"):
        GenerateRequest(prompt="x", **{field: value})


@pytest.mark.parametrize(("field", "value"), RIGHT)
def test_the_ends_of_each_range_are_taken(field: str, value: Any) -> None:
    tensors = GenerateRequest(prompt="x", **{field: value}).to_tensors(stream=True)
    assert {spec.name: sent for spec, sent in tensors.items()} == {
        "stream": True,
        "text_input": "x",
        field: value,
    }


def test_exactly_one_of_prompt_and_messages() -> None:
    messages = [Message("user", "x")]
    for wrong in ({}, {"prompt": "x", "messages": messages}):
        with pytest.raises(ValueError, match="exactly one of prompt and messages"):
            GenerateRequest(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="messages must not be empty"):
        GenerateRequest(messages=[])
    with pytest.raises(ValueError, match="role must not be empty"):
        Message("", "x")


def test_text_that_cannot_be_sent_is_refused() -> None:
    surrogate = b"caf\xe9".decode(errors="surrogateescape")  # as sys.argv has it
    for make in (lambda: GenerateRequest(prompt=surrogate), lambda: Message("user", surrogate)):
        with pytest.raises(ValueError, match=r"got '\\udce9' at character 3"):
            make()


def test_later_changes_to_messages_do_not_reach_the_request() -> None:
    messages = [Message("user", "x")]
    request = GenerateRequest(messages=messages)
    messages.clear()
    assert messages_sent(request) == {"messages": [{"role": "user", "content": "x"}]}
    turn: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    tools: list[Any] = [dict(TOOL)]
    request = GenerateRequest(messages=[turn], tools=tools)
    turn["tool_calls"] = []
    tools[0].clear()
    assert messages_sent(request)["messages"][0]["tool_calls"] == [CALL]
    assert messages_sent(request)["tools"] == [TOOL]


def test_every_input_of_the_contract_can_be_sent() -> None:
    sent = set(GenerateRequest(prompt="x", **FULL).to_tensors(stream=True))
    sent |= set(GenerateRequest(messages=[Message("user", "x")], enable_thinking=True).to_tensors(stream=True))
    assert sent == set(contract.GENERATE.inputs) - NEVER_SENT


def test_whether_the_prompt_comes_back_is_sent_as_given() -> None:
    for excludes in (True, False):
        tensors = GenerateRequest(prompt="x", exclude_input_in_output=excludes).to_tensors(stream=True)
        assert tensors[contract.OPTIONS["exclude_input_in_output"]] is excludes


def test_options_that_need_each_other() -> None:
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens, 2, got 3"):
        GenerateRequest(prompt="x", max_tokens=2, min_tokens=3)
    for field, value in (("enable_thinking", False), ("tools", [TOOL]), ("chat_template_kwargs", {"a": 1})):
        with pytest.raises(ValueError, match=f"{field} must come with messages"):
            GenerateRequest(prompt="x", **{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guide must be given with guide_type 'regex'"):
        GenerateRequest(prompt="x", guide_type="regex")
    with pytest.raises(ValueError, match=r"guide_type must be one of json, .*, got None"):
        GenerateRequest(prompt="x", guide="a+")
    assert GenerateRequest(prompt="x", guide_type="json").guide is None


@pytest.mark.parametrize(
    ("guide_type", "guide", "sent"),
    [
        ("json_schema", {"type": "object", "title": "é"}, '{"type": "object", "title": "é"}'),
        ("json_schema", '{"type":"object"}', '{"type":"object"}'),
        ("choice", ["yes", "no"], '["yes", "no"]'),
        ("choice", ("yes",), '["yes"]'),
        ("regex", "[0-9]+", "[0-9]+"),
        ("ebnf_grammar", 'root ::= "a"', 'root ::= "a"'),
    ],
)
def test_a_guide_travels_as_text(guide_type: Any, guide: Any, sent: str) -> None:
    tensors = GenerateRequest(prompt="x", guide_type=guide_type, guide=guide).to_tensors(stream=True)
    assert (
        tensors[contract.OPTIONS["guided_decoding_guide_type"]],
        tensors[contract.OPTIONS["guided_decoding_guide"]],
    ) == (guide_type, sent)


@pytest.mark.parametrize(
    ("guide_type", "guide"), [("regex", ["a"]), ("json_schema", {"maximum": math.nan}), ("choice", {"a": 1})]
)
def test_a_guide_that_is_no_text_is_refused(guide_type: Any, guide: Any) -> None:
    with pytest.raises(ValueError, match=rf"^guide must be .*got {re.escape(repr(guide))}$"):
        GenerateRequest(prompt="x", guide_type=guide_type, guide=guide)


def test_tools_and_template_variables_travel_with_the_messages() -> None:
    messages: list[Any] = [
        Message("user", "1 + 1?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
    ]
    request = GenerateRequest(messages=messages, tools=[TOOL], chat_template_kwargs={"thinking": True})
    assert messages_sent(request) == {
        "messages": [{"role": "user", "content": "1 + 1?"}, *messages[1:]],
        "tools": [TOOL],
        "chat_template_kwargs": {"thinking": True},
    }


@pytest.mark.parametrize(("field", "value"), [("tools", "add"), ("tools", [TOOL, {1}]), ("chat_template_kwargs", [1])])
def test_tools_that_are_none_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        GenerateRequest(messages=[Message("user", "x")], **{field: value})


def test_messages_may_be_plain_dicts() -> None:
    request = GenerateRequest(messages=[{"role": "user", "content": "hi"}])
    assert request == GenerateRequest(messages=[Message("user", "hi")])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": 3},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": "x", "tool_calls": {}},
        {"role": "tool", "content": "x", "tool_call_id": {1}},
        {"role": "", "content": "x", "name": "y"},
        {"role": "user", "content": "x", "name": "\udce9"},
        {"content": "x"},
        "hi",
        None,
    ],
)
def test_malformed_messages_are_refused(message: Any) -> None:
    with pytest.raises(ValueError, match=r"^messages\[1\]"):
        GenerateRequest(messages=[Message("user", "x"), message])


@pytest.mark.parametrize("messages", ["hi", {"role": "user", "content": "x"}, 7])
def test_messages_that_are_no_list_are_refused(messages: Any) -> None:
    with pytest.raises(ValueError, match="messages must be a list"):
        GenerateRequest(messages=messages)
