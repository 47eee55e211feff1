"""Outputs to chunks to answers, without a transport."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_triton.clients.api import Chunk, Generation, Times, ToolCall, TopLogProb
from deepseek_triton.clients.errors import ProtocolError
from deepseek_triton.clients.response import ChunkReader
from deepseek_triton.ensemble.protocol import contract
from tests.clients.test_fakes import reply, rows

START = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a"'}}


def read(*responses: dict[str, Any], num_sequences: int = 1) -> list[Chunk]:
    reader = ChunkReader(num_sequences)
    chunks = [chunk for response in responses for chunk in reader.read(rows(response))]
    assert reader.is_complete == (sum(chunk.finish_reason != "" for chunk in chunks) == num_sequences)
    return chunks


def test_a_generation_is_its_chunks_joined() -> None:
    chunks = [Chunk("Par", "", 3, 1), Chunk("is", "length", 3, 2)]
    assert Generation.from_chunks(chunks) == Generation("Paris", "length", 3, 2)
    for incomplete in ([], chunks[:1]):
        with pytest.raises(ValueError, match="finish_reason"):
            Generation.from_chunks(incomplete)


def test_everything_that_can_be_asked_for() -> None:
    top = json.dumps([{"id": 7, "token": "Ġé", "log_prob": -0.5}, {"id": 8, "token": "x", "log_prob": -2}])
    times: dict[str, Any] = {spec.name: 10 * 2**53 + i for i, spec in enumerate(contract.TIME_OUTPUTS, start=1)}
    first = reply(
        "Par", num_output_tokens=2, reasoning_output="hm", output_log_probs=[-0.5, -1], top_log_probs=[top, "[]"],
        cum_log_probs=-1.5, **times,
    )  # fmt: skip
    last = reply(
        "", "stop", num_output_tokens=2, reasoning_output="!", output_log_probs=[], top_log_probs=[],
        cum_log_probs=-1.5, **{**times, "last_token_time_ns": 99},
    )  # fmt: skip
    chunks = read(first, last)
    likeliest = (TopLogProb(7, "Ġé", -0.5), TopLogProb(8, "x", -2.0))
    assert chunks[0] == Chunk(
        "Par", "", 3, 2, reasoning="hm", log_probs=(-0.5, -1.0), top_log_probs=(likeliest, ()), cum_log_prob=-1.5,
        times=Times(*times.values()),
    )  # fmt: skip
    assert Generation.from_chunks(chunks) == Generation(
        "Par", "stop", 3, 2, reasoning="hm!", log_probs=(-0.5, -1.0), top_log_probs=(likeliest, ()), cum_log_prob=-1.5,
        times=replace(Times(*times.values()), last_token_ns=99),
    )  # fmt: skip


def test_tool_calls_come_in_pieces() -> None:
    more = {"index": 0, "function": {"arguments": ": 1}"}}
    other = {"index": 1, "id": "call_2", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    chunks = read(
        reply("", tool_calls=json.dumps([START])),
        reply("", tool_calls="[]"),
        reply("", "stop", tool_calls=json.dumps([more, other])),
    )
    assert [chunk.tool_calls for chunk in chunks] == [
        (ToolCall(0, "call_1", "add", '{"a"'),),
        (),
        (ToolCall(0, None, None, ": 1}"), ToolCall(1, "call_2", "now", "{}")),
    ]
    calls = Generation.from_chunks(chunks).tool_calls
    assert calls == (ToolCall(0, "call_1", "add", '{"a": 1}'), ToolCall(1, "call_2", "now", "{}"))
    assert calls[0].to_dict() == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1}'},
    }


@pytest.mark.slow
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 2**32))
def test_sequences_come_out_as_they_went_in(lengths: list[int], seed: int) -> None:
    """Whatever tokens of whichever sequences travel together, in whatever order, each gets its own."""
    random = Random(seed)
    tokens = {i: [(f"<{i}.{j}>", -float(10 * i + j)) for j in range(length)] for i, length in enumerate(lengths)}
    sent = dict.fromkeys(tokens, 0)
    finished: set[int] = set()
    responses = []
    while open_ := sorted(set(tokens) - finished):
        told = []
        for i in random.sample(open_, random.randint(1, len(open_))):
            end = random.randint(sent[i], len(tokens[i]))
            is_last = end == len(tokens[i]) and random.random() < 0.5
            new = tokens[i][sent[i] : end]
            text = "".join(text for text, _ in new)
            log_probs = [value for _, value in new]
            told.append(reply(text, "stop" if is_last else "", end, sequence_index=i, output_log_probs=log_probs))
            sent[i] = end
            finished |= {i} if is_last else set()
        responses.append(rows(*told))
    answers = Generation.all_from_chunks(read(*responses, num_sequences=len(lengths)))
    assert [(answer.sequence_index, answer.text, answer.log_probs) for answer in answers] == [
        (i, "".join(text for text, _ in pairs), tuple(value for _, value in pairs)) for i, pairs in tokens.items()
    ]


def test_one_of_several_may_fail() -> None:
    chunks = read(
        rows(reply("a", sequence_index=0), reply("b", "error", sequence_index=1)),
        reply("c", "stop", 2, sequence_index=0),
        num_sequences=2,
    )
    answers = Generation.all_from_chunks(chunks)
    assert [(answer.text, answer.finish_reason) for answer in answers] == [("ac", "stop"), ("b", "error")]


def test_a_request_for_more_answers_than_fit_into_memory_is_the_servers_to_refuse() -> None:
    assert not ChunkReader(2**31 - 1).is_complete


BROKEN: dict[str, list[dict[str, Any]]] = {
    "text_output must hold 1 STRING, got []": [{**reply("x"), "text_output": []}],
    "finish_reason must hold 1 STRING, got ['', '']": [{**reply("x"), "finish_reason": ["", ""]}],
    "num_input_tokens is missing": [{key: value for key, value in reply("x").items() if key != "num_input_tokens"}],
    "num_output_tokens must hold INT32, got True": [reply("x", num_output_tokens=True)],
    "num_output_tokens must hold INT32, got 1.5": [{**reply("x"), "num_output_tokens": 1.5}],
    "num_output_tokens must not fall, got 1 after 2": [reply("x", num_output_tokens=2), reply("x")],
    "sequence_index must be 0 to 0, got 1": [reply("x", sequence_index=1)],
    "sequence_index must be 0 to 0, got -1": [reply("x", sequence_index=-1)],
    "of sequence 0": [rows(reply("x", "stop"), reply("y"))],
    "output_log_probs must hold a value for each new token, got too few": [reply("x", output_log_probs=[])],
    "output_log_probs must hold a value for each new token, got [-2.0] beyond": [reply("x", output_log_probs=[-1, -2])],
    "output_log_probs must hold FP32, got None": [reply("x", output_log_probs=[None])],
    "tool_calls must be a JSON list of calls, got 'add'": [reply("x", tool_calls="add")],
    "tool_calls must be a JSON list of calls, got '[7]'": [reply("x", tool_calls="[7]")],
    "top_log_probs must be a JSON list of tokens, got '[{}]'": [reply("x", top_log_probs="[{}]")],
    "finish_reason must be empty or one of ('stop',": [reply("x", "tired")],
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_response_that_breaks_the_contract(message: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(message)):
        read(*BROKEN[message])
