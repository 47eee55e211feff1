"""The clients' exceptions.

    ClientError
    ├── ServerUnavailable   nothing answers at the address, or the connection broke
    ├── RequestTimeout      no complete answer within `timeout_s`
    ├── RequestRejected     the server answered with an error: its text
    │   └── ServerOverloaded    it has no room now: the same request may succeed later
    └── ProtocolError       the server's answer isn't what `ensemble.protocol.contract` promises

A request that can't be sent at all (a value out of its range, a malformed address) is a `ValueError`. This
module knows no transport: `grpc_wire.py` and `http_wire.py` translate their libraries' exceptions into these.
"""

from __future__ import annotations

from deepseek_triton.ensemble.protocol.contract import RETRY
from deepseek_triton.ensemble.protocol.error_kind import FailureKind, split_kind


class ClientError(Exception):
    """The base class: a request was sent, or was to be sent, and got no complete answer."""


class ServerUnavailable(ClientError):  # noqa: N818
    """Nothing answers at the address, or the connection broke before the answer was complete."""


class RequestTimeout(ClientError):  # noqa: N818
    """The answer wasn't complete within the client's `timeout_s`."""


class RequestRejected(ClientError):  # noqa: N818
    """The server answered with an error; the message is the server's own text.

    Triton 2.51 answers a full queue and a wrong option alike: over HTTP with status 400, over gRPC with a text. The
    text tells them apart: that of an overloaded server ends with RETRY.

    kind: whose fault it is, where the model says so, which it does over gRPC: "invalid" is the request's, "unavailable"
    passes.
    """

    def __init__(self, message: str, kind: FailureKind | None = None) -> None:
        super().__init__(message)
        self.kind = kind


class ServerOverloaded(RequestRejected):
    """The server has no room for the request now; it may succeed later."""


def rejection(text: str) -> RequestRejected:
    """The exception for the server's error `text`."""
    message, kind = split_kind(text)
    error = ServerOverloaded if message.endswith(RETRY) else RequestRejected
    return error(message, None if message == text else kind)  # Triton's own errors have no kind


class ProtocolError(ClientError):
    """The server's answer breaks the contract: a missing, mistyped or superfluous response."""
