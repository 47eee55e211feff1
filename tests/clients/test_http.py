"""What only the HTTP client has: server-sent events, and errors under any status."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.errors import RequestRejected
from deepseek_triton.clients.http import HttpClient
from deepseek_triton.clients.sse import EventReader
from tests.clients.test_fakes import MODEL, Fail, FakeHttpServer, Received, Reply, reply, say

REQUEST = GenerateRequest(prompt="Hello")
# Everything at which str.splitlines cuts and JSON needs no escape, and a character outside the BMP.
TEXT = "a\u2028b\u2029c\u0085d\x7f🗼é"


def iter_events(pieces: Iterable[bytes]) -> Iterator[str]:
    reader = EventReader()
    for piece in pieces:
        yield from reader.push(piece)


@pytest.mark.parametrize("cut", [1, 2, 7, None])
def test_text_survives_any_cut_of_the_stream(cut: int | None) -> None:
    with FakeHttpServer(say(TEXT, "\n", TEXT)) as server, HttpClient(server.url, MODEL, 10.0) as client:
        server.cut = cut
        assert [chunk.text for chunk in client.stream(REQUEST)] == [TEXT, "\n", TEXT]
        assert client.generate(REQUEST).text == TEXT + "\n" + TEXT


def test_chunks_arrive_before_the_answer_is_complete() -> None:
    def script(received: Received) -> Iterator[Reply]:
        yield reply("first")
        assert server.hang.wait(10)
        yield reply("last", "stop")

    with FakeHttpServer(script) as server, HttpClient(server.url, MODEL, 10.0) as client:
        stream = client.stream(REQUEST)
        assert next(stream).text == "first"
        server.hang.set()
        assert [chunk.text for chunk in stream] == ["last"]


def test_an_error_under_status_200() -> None:
    text = "generate expects model to produce exactly 1 response"
    with (
        FakeHttpServer(lambda received: iter([Fail(text, status=200)])) as server,
        HttpClient(server.url, MODEL, 10.0) as client,
        pytest.raises(RequestRejected, match=text),
    ):
        client.generate(REQUEST)


def test_an_address_that_is_no_triton() -> None:
    with FakeHttpServer(say("x")) as server, HttpClient(server.url + "/prefix/", MODEL, 10.0) as client:
        with pytest.raises(RequestRejected, match="404"):
            client.generate(REQUEST)
        assert not client.is_ready()


def test_the_models_name_is_escaped() -> None:
    with FakeHttpServer(say("x")) as server, HttpClient(server.url, "a/b c", 10.0) as client:
        client.generate(REQUEST)
        assert [received.model for received in server._received] == ["a%2Fb%20c"]


@pytest.mark.slow
@settings(max_examples=50)
@given(st.lists(st.text()), st.sampled_from(["\n", "\r\n"]), st.data())
def test_events_do_not_depend_on_the_pieces(texts: list[str], end: str, data: st.DataObject) -> None:
    events = [text.replace("\n", "").replace("\r", "") for text in texts]
    stream = "".join(f": ping{end}event: message{end}data: {event}{end}{end}" for event in events).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    pieces = [stream[i:j] for i, j in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert list(iter_events(pieces)) == events


def test_events_as_the_standard_has_them() -> None:
    assert list(iter_events([b"data:a\ndata: b\n\n\n\ndata:  c\n\ndata: never ended\n"])) == ["a\nb", " c"]
