"""What the end of a request says of the server that had it: whether it works, and whether another one may do better."""

from __future__ import annotations

import asyncio
from typing import Literal

from deepseek_triton.clients import RequestRejected, RequestTimeout, ServerOverloaded
from deepseek_triton.gateway.backend.base import OverloadedError

# answered: it works. invalid: the client's fault, which the server has found out. busy: it has no room now.
# given_up: nobody waits for the answer any more. failed: the server, or the way to it.
Verdict = Literal["answered", "invalid", "busy", "given_up", "failed"]
# In the errors of servers that have no room, or had none in the time that the client gave.
_LOAD = ("timed out", "exceeds maximum queue size")


def verdict_of(error: BaseException) -> Verdict:
    """What the exception that ended a request says."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "given_up"
    if isinstance(error, ServerOverloaded | OverloadedError):
        return "busy"
    if isinstance(error, RequestRejected) and error.kind == "invalid":
        return "invalid"
    if isinstance(error, RequestRejected) and error.kind != "internal" and any(text in str(error) for text in _LOAD):
        return "busy"
    return "invalid" if isinstance(error, ValueError) else "failed"


def may_be_retried(error: Exception) -> bool:
    """Whether another server may answer what ended so; one that has taken all the time there was is the last one."""
    return not isinstance(error, RequestTimeout) and verdict_of(error) in ("busy", "failed")
