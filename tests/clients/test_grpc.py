"""What only the gRPC client has: its wire format and its connection."""

from __future__ import annotations

import socket
import time
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

import deepseek_triton.clients.grpc as clients_grpc
from deepseek_triton.clients import grpc_wire
from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.errors import ProtocolError
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.protocol import contract
from tests.clients.test_fakes import MODEL, FakeGrpcServer, reply, say, wait_until

REQUEST = GenerateRequest(prompt="Hello")


def test_the_grpc_package_is_not_this_projects() -> None:
    assert vars(clients_grpc)["grpc"] is grpc
    assert "clients" not in str(grpc.__file__)


def _response(datatype: str, raw: bytes) -> Any:
    response = service_pb2.ModelInferResponse(raw_output_contents=[raw])
    response.outputs.add(name="finish_reason", datatype=datatype, shape=[1, 1])
    return response


@pytest.mark.parametrize(
    ("datatype", "raw"),
    [
        ("INT32", b"\0\0\0\0"),
        ("BYTES", b""),
        ("BYTES", b"\5\0\0\0stop"),
        ("BYTES", b"\4\0\0\0stop\0\0\0\0"),  # two strings
        ("BYTES", b"\1\0\0\0\xff"),
    ],
)
def test_a_malformed_string_is_refused(datatype: str, raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="finish_reason must be"):
        grpc_wire.read_response(_response(datatype, raw), (contract.FINISH_REASON,))


def test_contents_that_do_not_fit_the_shape_are_refused() -> None:
    response = service_pb2.ModelInferResponse(raw_output_contents=[bytes(16)])
    response.outputs.add(name="arrival_time_ns", datatype="INT64", shape=[1, 1])
    with pytest.raises(ProtocolError, match=r"arrival_time_ns must be of shape \[1, 1\], got 2 elements"):
        grpc_wire.read_response(response, (contract.ARRIVAL_TIME_NS,))
    with pytest.raises(ProtocolError, match="arrival_time_ns must be INT64"):
        grpc_wire.decode(contract.ARRIVAL_TIME_NS, bytes(9))


@pytest.mark.parametrize("texts", [[], [""], ["a", "", "b\u2028🗼"]])
def test_a_tensor_of_any_number_of_strings(texts: list[str]) -> None:
    raw = grpc_wire.encode(contract.OPTIONS["stop_words"], texts)
    assert grpc_wire.decode(contract.TEXT_OUTPUT, raw) == texts


def test_an_output_without_contents_is_refused() -> None:
    response = _response("BYTES", b"\0\0\0\0")
    del response.raw_output_contents[:]
    with pytest.raises(ProtocolError, match="contents for 1 outputs, got 0"):
        grpc_wire.read_response(response, (contract.FINISH_REASON,))


def test_generate_refuses_a_stream() -> None:
    script = lambda received: iter([reply("a"), reply("b", "stop")])  # noqa: E731
    with (
        FakeGrpcServer(script) as server,
        GrpcClient(server.url, MODEL, 10.0) as client,
        pytest.raises(ProtocolError, match="one response"),
    ):
        client.generate(REQUEST)


@pytest.mark.slow
def test_a_client_that_waits_for_its_server_finds_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with GrpcClient(f"127.0.0.1:{port}", MODEL, 10.0) as client:
        assert not client.is_ready()
        with FakeGrpcServer(say("x"), port=port):
            started = time.monotonic()
            wait_until(client.is_ready)
            assert time.monotonic() - started < 15  # its wait between attempts doesn't grow to minutes
            assert client.generate(REQUEST).text == "x"
