"""What can go wrong between a client and the server.

    ClientError
    ├── ServerUnavailable   nothing answers at the address, or the connection broke
    ├── RequestTimeout      no complete answer within `timeout_s`
    ├── RequestRejected     the server answered with an error: its text
    └── ProtocolError       the server's answer isn't what `ensemble.protocol.contract` promises

A request that can't be sent at all (a value out of its range, a malformed address) is a `ValueError`. This
file knows no transport: `grpc.py` and `http.py` translate their libraries' exceptions into these.
"""

from __future__ import annotations


class ClientError(Exception):
    """A request that was sent, or tried, and brought no complete answer."""


class ServerUnavailable(ClientError):  # noqa: N818
    """Nothing answers at the address, or the connection broke before the answer was complete."""


class RequestTimeout(ClientError):  # noqa: N818
    """The answer wasn't complete within the client's `timeout_s`."""


class RequestRejected(ClientError):  # noqa: N818
    """The server answered with an error; the message is the server's own text.

    A full queue and a wrong option are one kind: Triton 2.51 answers both with HTTP status 400, over gRPC with text.
    """


class ProtocolError(ClientError):
    """The server's answer breaks the contract: a missing, mistyped or superfluous response."""
