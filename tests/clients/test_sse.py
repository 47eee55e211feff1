"""Server-sent events as servers and proxies send them, cut anywhere."""

from __future__ import annotations

import pytest

from deepseek_triton.clients.sse import EventReader
from deepseek_triton.gateway.apis.wire import sse

DATA = {"text": "é🗼\u2028\n\r\x85 中"}


def read(stream: bytes, cut: int) -> list[str]:
    reader = EventReader()
    return [event for i in range(0, len(stream), cut) for event in reader.push(stream[i : i + cut])]


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 1000])
def test_multi_byte_text_cut_in_two_is_whole_again(cut: int) -> None:
    stream = sse.event(DATA) + sse.event(DATA, "response.created") + sse.DONE
    expected = sse.event(DATA).decode().removeprefix("data: ").removesuffix("\n\n")
    assert read(stream, cut) == [expected, expected, "[DONE]"]


@pytest.mark.parametrize("cut", [1, 2, 1000])
def test_a_comment_line_breaks_nothing(cut: int) -> None:
    stream = (
        b": hello\n\n" + sse.HEARTBEAT + b"data: a\n: within\ndata: b\n\n:\r\n\r\nid: 1\nretry: 5\ndata: c\r\n\r\n:"
    )
    assert read(stream, cut) == ["a\nb", "c"]
