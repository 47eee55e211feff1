"""Both forms of an address for both protocols."""

from __future__ import annotations

import pytest

from deepseek_triton.clients.address import read_address
from deepseek_triton.clients.connect import ProtocolName


@pytest.mark.parametrize(
    ("url", "protocol", "expected"),
    [
        (None, None, ("grpc", "localhost:8001")),
        (None, "http", ("http", "http://localhost:8000")),
        ("a:9", None, ("grpc", "a:9")),
        ("a", None, ("grpc", "a:8001")),
        ("grpc://a:9", None, ("grpc", "a:9")),
        ("grpc://a/", None, ("grpc", "a:8001")),
        ("http://a:9", None, ("http", "http://a:9")),
        ("https://a", None, ("http", "https://a")),
        ("http://a:9", "grpc", ("grpc", "a:9")),
        ("a:9", "http", ("http", "http://a:9")),
        ("a", "http", ("http", "http://a:8000")),
        ("grpc://a:9", "http", ("http", "http://a:9")),
        ("[::1]:9", None, ("grpc", "[::1]:9")),
        ("[::1]", None, ("grpc", "[::1]:8001")),
        ("http://user:word@a", None, ("http", "http://user:word@a")),
    ],
)
def test_an_address_is_read(url: str | None, protocol: ProtocolName | None, expected: tuple[str, str]) -> None:
    assert read_address(url, protocol) == expected


@pytest.mark.parametrize(
    ("url", "protocol", "message"),
    [
        ("ftp://a", None, "url must be host:port, or begin with grpc://, http://, https://; got 'ftp://a'"),
        ("https://a", "grpc", "url must not begin with https:// for gRPC"),
        ("a:99999", None, "the port in --url must be a number from 1 to 65535, got '99999'"),
        ("http://a:0/", None, "the port in --url must be a number from 1 to 65535, got '0'"),
        ("grpc://a:eight", "http", "the port in --url must be a number from 1 to 65535, got 'eight'"),
    ],
)
def test_an_address_is_refused(url: str, protocol: ProtocolName | None, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_address(url, protocol)
    assert str(caught.value).startswith(message)
