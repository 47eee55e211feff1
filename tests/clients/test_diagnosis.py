"""A wrong model or address: the commands say what to write instead, not Triton's words for what failed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deepseek_triton.builders.cli import main
from deepseek_triton.clients.nearest import name_hint, nearest
from deepseek_triton.clients.server.metadata import read_host
from tests.clients.test_fakes import MODEL, UNKNOWN, Fail, FakeGrpcServer, FakeHttpServer, FakeServer

GENERATES = (["text_input", "messages", "stream"], ["text_output", "finish_reason"])
SCORES = (["text_input", "messages", "labels"], ["label", "probabilities"])
TOKENIZES = (["text_input", "messages"], ["input_ids", "prompt_info"])
FOREIGN = (["INPUT0"], ["OUTPUT0"])


@pytest.fixture(params=[FakeGrpcServer, FakeHttpServer], ids=["grpc", "http"])
def server(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    """A server that refuses every request, as Triton does one for the wrong model."""
    with request.param(lambda received: iter([Fail(UNKNOWN.format(received.model))])) as server:
        server.tensors = {
            MODEL: GENERATES,
            f"{MODEL}-tokenizer": TOKENIZES,
            "moods": SCORES,
            "moods-tokenizer": TOKENIZES,
            "add": FOREIGN,
        }
        yield server


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("generate", "tinny", "x"), f"has no model 'tinny'; did you mean {MODEL}?"),
        (("generate", "TINY", "x"), f"has no model 'TINY'; did you mean {MODEL}?"),
        (("chat", "tinny"), f"has no model 'tinny'; did you mean {MODEL}?"),
        (("score", "mood", "x"), "has no model 'mood'; did you mean moods?"),
        (("generate", "zebra", "x"), f"has no model 'zebra'; there are moods, {MODEL}"),
        (("generate", f"{MODEL}-tokenizer", "x"), f"{MODEL}-tokenizer is a part of {MODEL}, which only {MODEL} calls"),
        (("chat", f"{MODEL}-tokenizer"), f"{MODEL}-tokenizer is a part of {MODEL}, which only {MODEL} calls"),
        (("score", f"{MODEL}-tokenizer", "x"), f"{MODEL}-tokenizer is a part of {MODEL}, which only {MODEL} calls"),
        (("generate", "moods", "x"), "moods is a scoring model, which generates no text; use: deepseek-triton score"),
        (("chat", "moods"), "moods is a scoring model, which generates no text; use: deepseek-triton score"),
        (("score", MODEL, "x"), f"{MODEL} generates text, it is no scoring model; use: deepseek-triton generate"),
        (("generate", "add", "x"), "is none of this project's models"),
    ],
)
def test_a_wrong_model(
    server: FakeServer, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    assert main([*words, "--url", server.url]) == 1
    out, err = capsys.readouterr()
    assert out == "" and expected in err and err.count("\n") == 1
    assert "unknown model" not in err and "inference input" not in err


def test_a_server_that_tells_no_names(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.tells_index = False
    assert main(["generate", "tinny", "x", "--url", server.url]) == 1
    assert "has no model 'tinny'; check the name: `deepseek-triton list`" in capsys.readouterr().err


@contextmanager
def web(body: str, status: int = 200) -> Iterator[str]:
    """An HTTP server that answers everything with `body`; gives host:port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_names_come_from_the_metrics_where_the_index_is_closed(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tells_index = False
    names = (MODEL, f"{MODEL}-tokenizer", "moods", "gone")
    body = "".join(f'nv_inference_request_success{{model="{name}",version="1"}} 0\n' for name in names)
    with web(body) as address:
        distance = int(address.rpartition(":")[2]) - int(server.url.rpartition(":")[2])
        monkeypatch.setattr("deepseek_triton.clients.server.metadata.TO_METRICS", {"grpc": distance, "http": distance})
        assert main(["generate", "zebra", "x", "--url", server.url]) == 1
    assert f"has no model 'zebra'; there are moods, {MODEL}\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("generate", MODEL, "x"), ("chat", MODEL), ("score", MODEL, "x")])
@pytest.mark.parametrize("scheme", ["http://", "grpc://"])
def test_a_port_that_is_none_of_requests(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...], scheme: str
) -> None:
    with web("# TYPE nv_inference_request_success counter\n") as address:
        assert main([*command, "--url", f"{scheme}{address}"]) == 1
        err = capsys.readouterr().err
        assert "is the port of Triton's metrics; requests go to another one (by default grpc 8001, http 8000)" in err
    with web("<html>welcome</html>", 404) as address:
        assert main([*command, "--url", f"{scheme}{address}"]) == 1
        assert "is no Triton; check --url" in capsys.readouterr().err


def test_the_other_protocols_port(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeHttpServer(lambda received: iter([])) as server:
        address = server.url.removeprefix("http://")
        assert main(["generate", MODEL, "x", "--url", address]) == 1
        assert f"use --url http://{address}" in capsys.readouterr().err
        assert main(["generate", MODEL, "x", "--url", f"{server.url}/proxy"]) == 1
        assert f"Triton answers at {server.url}, but not below /proxy" in capsys.readouterr().err
    with FakeGrpcServer(lambda received: iter([])) as other:
        assert main(["generate", MODEL, "x", "--url", f"http://{other.url}"]) == 1
        assert f"use --url grpc://{other.url}" in capsys.readouterr().err


@pytest.mark.parametrize("rest", ["/v2", "/v2/", "/v1", "/v2/models/tiny/generate"])
@pytest.mark.parametrize("scheme", ["", "http://", "grpc://"])
def test_an_address_with_a_path_of_requests(capsys: pytest.CaptureFixture[str], scheme: str, rest: str) -> None:
    assert main(["generate", MODEL, "x", "--url", f"{scheme}localhost:9{rest}"]) == 1
    assert f"url must name the server alone, as {scheme}localhost:9; got" in capsys.readouterr().err


def test_names_that_are_near() -> None:
    assert nearest("SmolLM2", ["smollm2", "qwen"]) == "smollm2" and nearest("x", ["smollm2"]) is None
    assert name_hint("x", []) == "; there is none" and name_hint("x", ["smollm2"]) == "; there is smollm2"
    assert name_hint("x", [f"model{i}" for i in range(12)]).endswith("model9 and 2 more")


def test_the_host_of_an_address() -> None:
    assert read_host("[::1]:8001") == ("[::1]", 8001, "") and read_host("http://a/b") == ("a", None, "/b")
