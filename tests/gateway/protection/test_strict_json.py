"""Strict JSON: what is refused, how fast, and that nothing right is refused."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_triton.gateway.protection.strict_json import JsonBounds, JsonError, JsonTooLargeError, parse

BOUNDS = JsonBounds(max_depth=64, max_members=200_000)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"a": {"b": 1, "\\u0062": 2}}', "'b' twice"),
        (b'{"a": NaN}', "no NaN"),
        (b'{"a": -Infinity}', "no -Infinity"),
        (b'{"a": 1e999}', "double precision"),
        (b'{"a": 18446744073709551616}', "64 bits"),
        (b'{"a": -9223372036854775809}', "64 bits"),
        (b'{"a": ' + b"9" * 1_000_000 + b"}", "64 bits"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'{"a": "\xff"}', "byte at 7 is wrong"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),  # a surrogate's bytes
        (b'\xef\xbb\xbf{"a": 1}', "must be JSON"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"a": 1}x', "must be JSON"),
        (b'{"a": "\n"}', "must be JSON"),
        (b'{"a": 1', "must be JSON"),
        (b"{'a': 1}", "must be JSON"),
        (b'{"a": 01}', "must be JSON"),
        (b"\\", "must be JSON"),
        (b"", "must be JSON"),
    ],
)
def test_wrong_json_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        parse(body, BOUNDS)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 4_000_000,
        b'{"a":' * 800_000,
        b'{"a":' + b"[" * 1_000_000,
        b"[" * 65 + b"]" * 65,
        b"[" + b"[]," * 1_000_000 + b"[]]",
        b"[" + b"{}," * 1_000_000 + b"{}]",
        b"[" + b"1," * 2_000_000 + b"1]",
        b'["' + b'","' * 1_300_000 + b'"]',
        b'"' * 4_000_000,
        b'["' + b'\\"' * 1_999_000 + b"[" * 100,  # one string without an end
        b"]" * 4_000_000,
        b'{"a":"' + b"\\" * 3_999_999,
    ],
    ids=lambda body: body[:12].decode(),
)
def test_bodies_that_exhaust_parsers_are_refused_at_once(body: bytes) -> None:
    start = time.process_time()
    with pytest.raises(JsonError):
        parse(body, BOUNDS)
    assert time.process_time() - start < 1.5  # a tenth of it on an idle machine


def test_depth_is_exact_and_text_counts_for_nothing() -> None:
    deep = b'{"a":' * 64 + b"1" + b"}" * 64
    assert parse(deep, BOUNDS)
    with pytest.raises(JsonTooLargeError, match="deeper than 64"):
        parse(b"[" + deep + b"]", BOUNDS)
    text = '\\"[[[{{{,,,' * 100_000
    assert parse(json.dumps({"a": text}).encode(), JsonBounds(2, 8)) == {"a": text}


@pytest.mark.slow
@settings(max_examples=40)
@given(VALUES)
def test_every_right_value_comes_through(value: Any) -> None:
    for ascii_only in (True, False):
        assert parse(json.dumps(value, ensure_ascii=ascii_only).encode(), JsonBounds(512, 10_000)) == value


@pytest.mark.slow
@settings(max_examples=300)
@given(st.binary(max_size=60) | st.text('[]{}",:\\ud80a1 e+-.', max_size=60).map(str.encode))
def test_whatever_comes_is_read_as_any_parser_reads_it_or_refused(body: bytes) -> None:
    try:
        value = parse(body, JsonBounds(8, 64))
    except JsonError:
        return
    assert value == json.loads(body)
    json.dumps(value, ensure_ascii=False).encode()
