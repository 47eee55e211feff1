"""The clients' exceptions.

    ClientError
    ├── ServerUnavailable   nothing answers at the address, or the connection broke
    ├── RequestTimeout      no complete answer within `timeout_s`
    ├── RequestRejected     the server answered with an error: its text
    └── ProtocolError       the server's answer isn't what `ensemble.protocol.contract` promises

A request that can't be sent at all (a value out of its range, a malformed address) is a `ValueError`. This
module knows no transport: `grpc_wire.py` and `http_wire.py` translate their libraries' exceptions into these.
"""

from __future__ import annotations


class ClientError(Exception):
    """The base class: a request was sent, or was to be sent, and got no complete answer."""


class ServerUnavailable(ClientError):  # noqa: N818
    """Nothing answers at the address, or the connection broke before the answer was complete."""


class RequestTimeout(ClientError):  # noqa: N818
    """The answer wasn't complete within the client's `timeout_s`."""


class RequestRejected(ClientError):  # noqa: N818
    """The server answered with an error; the message is the server's own text.

    A full queue and a wrong option are the same error, since Triton 2.51 answers both alike: over HTTP with status 400,
    over gRPC with a text.
    """


class ProtocolError(ClientError):
    """The server's answer breaks the contract: a missing, mistyped or superfluous response."""
