"""What a client can do to a connection: bounds on headers, bodies, chunks, and on the time of each."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from deepseek_triton.clients import Chunk
from tests.gateway.test_app import CHAT
from tests.support.gateway import FakeBackend, gateway
from tests.support.raw_http import RawAnswer, connect, post_head, read_answer, send_raw
from tests.support.waiting import until

MAX_BODY = 100_000
BODY = json.dumps(CHAT).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway with short times and narrow bounds."""
    with gateway(
        FakeBackend(),
        max_body_bytes=MAX_BODY,
        max_chunks=100,
        max_headers=50,
        max_header_bytes=8192,
        header_timeout_s=0.5,
        body_timeout_s=0.5,
        max_connections=20,
    ) as url:
        yield url


def is_well(url: str) -> bool:
    return httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200


def dribble(url: str, head: bytes, drop: bytes, pause_s: float = 0.05) -> RawAnswer:
    """Send `head`, then `drop` again and again, until an answer comes or the connection is closed."""
    with connect(url) as connection:
        start = time.monotonic()
        connection.sendall(head)
        stop = threading.Event()

        def send() -> None:
            while not stop.wait(pause_s):
                try:
                    connection.sendall(drop)
                except OSError:
                    return

        thread = threading.Thread(target=send)
        thread.start()
        answer = read_answer(connection, start)
        stop.set()
        thread.join()
    return answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post_head(MAX_BODY + 1), 413),  # refused before anything of it comes
        (post_head(10**17), 413),
        (post_head(None) + b"%x\r\n" % MAX_BODY + b" " * MAX_BODY + b"\r\n1\r\n \r\n", 413),  # without an end
        (post_head(None) + b"ffffffff\r\n" + b" " * (MAX_BODY + 1), 413),
        (post_head(None) + b"1\r\nA\r\n" * 600_000, 413),  # kills Triton 2.51
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 1e3\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", 415),
        (HEAD + b"a: b\r\n" * 100 + b"\r\n", 431),
        (HEAD + b"a: " + b"b" * 9000 + b"\r\n\r\n", 431),
        (HEAD + b"a: " + b"b" * 2_000_000, 431),  # without an end
        (HEAD + b"b" * 2_000_000, 431),
        (b"POST /" + b"a" * 2_000_000, 431),
        (b"\x00" * 100_000, 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET http://[::1 HTTP/1.1\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (post_head(3_000_000) + b"[" * MAX_BODY, 413),
        (post_head(60_000) + b"[" * 60_000, 413),  # nested
    ],
)
def test_what_is_too_much_is_refused_and_harms_nobody(url: str, data: bytes, status: int) -> None:
    answer = send_raw(url, data)
    assert answer.status == status, answer.text[:300]
    assert answer.seconds < 10
    assert b'{"error"' in answer.text or status == 400
    assert is_well(url)


def test_bodies_within_the_bounds_come_through(url: str) -> None:
    padded = BODY[:-1] + b" " * (MAX_BODY - len(BODY)) + b"}"
    assert send_raw(url, post_head(MAX_BODY) + padded).status == 200
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (padded[:50_000], padded[50_000:]))
    assert send_raw(url, post_head(None) + chunked + b"0\r\n\r\n").status == 200
    cut = [b"1\r\n%c\r\n" % byte for byte in BODY]
    assert len(cut) < 100
    assert send_raw(url, post_head(None) + b"".join(cut) + b"0\r\n\r\n").status == 200


def test_a_refused_body_is_read_no_further(url: str) -> None:
    """The client that goes on sending is told, and soon cut off."""
    num_bytes = 0
    with connect(url) as connection:
        connection.sendall(post_head(10**12))
        start = time.monotonic()
        with pytest.raises(OSError):  # reset or broken pipe
            while time.monotonic() - start < 60:
                num_bytes += connection.send(b"x" * 65536)
    assert num_bytes < 64 * MAX_BODY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "drop", "status"),
    [
        (b"GET / HTTP/1.1\r\n", b"a: b\r\n", 408),
        (b"", b"\r\n", 408),
        (b"G", b"E", 400),
        (post_head(1000), b" ", 408),
        (post_head(None), b"1\r\n \r\n", 408),
    ],
)
def test_slow_senders_are_ended(url: str, head: bytes, drop: bytes, status: int) -> None:
    answer = dribble(url, head, drop)
    assert answer.status == status and answer.seconds < 10  # half a second on an idle machine
    assert is_well(url)


@pytest.mark.slow
def test_connections_that_say_nothing_are_closed(url: str) -> None:
    with connect(url) as connection:
        start = time.monotonic()
        assert connection.recv(1) == b""
    assert 0.4 < time.monotonic() - start < 10


@pytest.mark.slow
def test_a_kept_connection_may_be_idle_longer_than_headers_may_take(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        for _ in range(2):
            assert client.get("/health/live").status_code == 200
            stream = client._transport._pool.connections  # type: ignore[attr-defined]
            assert len(stream) == 1
            time.sleep(0.8)


@pytest.mark.slow
def test_connections_are_bounded() -> None:
    with gateway(FakeBackend(), max_connections=20) as url:
        exceed_connections(url)


def exceed_connections(url: str) -> None:
    connections = [connect(url) for _ in range(40)]
    try:
        until(lambda: sum(map(is_closed, connections)) >= 20)
    finally:
        for connection in connections:
            connection.close()
    until(lambda: is_well_again(url))


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def is_well_again(url: str) -> bool:
    """Whether it answers, now that others have left: at first it may not have seen that."""
    try:
        return is_well(url)
    except httpx.TransportError:
        return False


def test_many_requests_at_once_on_one_connection_end_it(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionError:
            pass
    assert received.count(b"HTTP/1.1 200") < 100
    assert is_well(url)


@contextlib.contextmanager
def streamed(backend: FakeBackend) -> Iterator[tuple[str, socket.socket]]:
    """A gateway that waits a second for a reader, and a connection with a small buffer that asked for a stream."""
    with gateway(backend, send_timeout_s=1.0) as url, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        body = json.dumps({**CHAT, "stream": True}).encode()
        connection.sendall(post_head(len(body)) + body)
        yield url, connection


@pytest.mark.slow
def test_a_stream_whose_client_does_not_read_is_ended() -> None:
    backend = FakeBackend([Chunk("x" * 1000, "", 5, 1)] * 100_000)
    with streamed(backend) as (url, _):
        until(lambda: backend.running == 1)
        until(lambda: (backend.running, backend.cancelled) == (0, 1))
        assert is_well_streamed(url)


def is_well_streamed(url: str) -> bool:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        return response.status_code == 200 and bool(next(response.iter_bytes()))


@pytest.mark.slow
def test_a_slow_reader_that_reads_keeps_its_stream() -> None:
    backend = FakeBackend([Chunk("x" * 1000, "", 5, 1)] * 300)
    with streamed(backend) as (_, connection):
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            part = connection.recv(16384)
            assert part
            received += part
            time.sleep(0.01)
    assert received.count(b"x" * 1000) == 300


def test_a_client_that_leaves_ends_its_request_though_others_wait_behind_it() -> None:
    backend = FakeBackend([Chunk("a", "", 5, 1)] * 1000, pause_s=0.02)
    with gateway(backend) as url:
        with connect(url) as connection:
            connection.sendall((post_head(len(BODY)) + BODY) * 3)
            until(lambda: backend.running == 1)
        until(lambda: (backend.running, backend.cancelled) == (0, 1))
        assert len(backend.requests) == 1


@pytest.mark.slow
def test_a_client_that_leaves_in_its_body_is_no_server_error(caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(pause_s=60)
    with gateway(backend) as url:
        with connect(url) as connection:
            connection.sendall(post_head(1000) + b"{")
            time.sleep(0.2)
        with connect(url) as connection:
            body = json.dumps({**CHAT, "stream": True}).encode()
            connection.sendall(post_head(len(body)) + body)
            until(lambda: backend.running == 1)

        def statuses() -> str:
            return httpx.get(f"{url}/metrics").text

        until(lambda: statuses().count('status="499"') >= 2)
        assert 'status="500"' not in statuses()
