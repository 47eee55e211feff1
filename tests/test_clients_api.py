from __future__ import annotations

import math
import re
from typing import Any

import pytest

from clients.api import Chunk, GenerateRequest, Generation, Message
from ensemble import contract

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
]


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
    assert request.to_tensors(stream=False)[contract.MESSAGES] == '[{"role": "user", "content": "x"}]'


def test_every_input_of_the_contract_can_be_sent() -> None:
    options = {"max_tokens": 1, "temperature": 1, "top_k": 1, "top_p": 1, "seed": 1}
    sent = set(GenerateRequest(prompt="x", **options).to_tensors(stream=True))  # type: ignore[arg-type]
    sent |= set(GenerateRequest(messages=[Message("user", "x")]).to_tensors(stream=True))
    assert sent == set(contract.GENERATE.inputs)


def test_a_generation_is_its_chunks_joined() -> None:
    chunks = [Chunk("Par", "", 3, 1), Chunk("is", "length", 3, 2)]
    assert Generation.from_chunks(chunks) == Generation("Paris", "length", 3, 2)
    for incomplete in ([], chunks[:1]):
        with pytest.raises(ValueError, match="finish_reason"):
            Generation.from_chunks(incomplete)


def test_messages_may_be_plain_dicts() -> None:
    request = GenerateRequest(messages=[{"role": "user", "content": "hi"}])
    assert request == GenerateRequest(messages=[Message("user", "hi")])


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": 3}, "hi", None])
def test_malformed_messages_are_refused(message: Any) -> None:
    with pytest.raises(ValueError, match=r"messages|content"):
        GenerateRequest(messages=[message])
