"""The redactor that is used unless another is given."""

from __future__ import annotations

import time

import pytest

from deepseek_triton.gateway.collection.redaction import redact


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("mail bob.smith+x@ex-ample.co.uk now", "mail [email] now"),
        ("<mailto:bob@example.org>", "<mailto:[email]>"),
        ("+49 171 2345678 or (030) 123 4567", "[phone] or [phone]"),
        ("555-123-4567, 06 12 34 56 78, tel:0171/2345678", "[phone], [phone], tel:[phone]"),
        ("+1 (555) 123-4567", "[phone]"),
        ("4111 1111 1111 1111, 4111111111111111 and 4111-1111-1111-1111", "[card], [card] and [card]"),
        ("sk-0123456789abcdef-abcdefghijklmnop", "[key]"),
        ("AKIAIOSFODNN7EXAMPLE and ghp_abcdefghijklmnopqrstuvwx", "[key] and [key]"),
        ("password: hunter2hunter2; Bearer abcdefghijk123456", "password: [key]; Bearer [key]"),
        ('{"api_key": "0123456789abcdef"}', '{"api_key": "[key]"}'),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefgh123", "[key]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nDEK-Info: A\nab+/=\n-----END RSA PRIVATE KEY-----\nend", "[key]\nend"),
    ],
)  # fmt: skip
def test_what_names_a_person_or_opens_a_door_goes(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "on 2026-11-28 at 10:20:30, pi is 3.14159265358979, 1700000000 s",
        "192.168.100.200, version 1.2.3-4.5.6, 0.123456789",
        "tokenizer_config.json and tokens per second 1234567",
        "the token is unfortunately missing",
        "x = 1 + 23456789 - 12 / 345678",
        "from 01.02.2026 to 03.04.2026",
        "4111 1111 1111 1112 is no card: its check digit is wrong",
        "a@b is no address",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece", ["a.", "1 2", "eyJ", "token ", "+1 ", "-----BEGIN PRIVATE KEY-----", "a@b.", "(", "9", "sk-"]
)
def test_time_grows_with_the_text_alone(piece: str) -> None:
    def seconds(size: int) -> float:
        text = piece * (size // len(piece))
        began = time.process_time()
        redact(text)
        return time.process_time() - began

    small = min(seconds(10_000) for _ in range(3))
    assert min(seconds(80_000) for _ in range(2)) < 30 * small + 0.02  # 8 times; 64 would be quadratic
