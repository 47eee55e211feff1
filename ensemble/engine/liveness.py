"""Whether somebody still listens: acknowledgements, heartbeats, and how long to wait for them.

The detokenizer acknowledges every response that it receives, and Triton hands it none once the client has gone. A
request that has nothing to say, because it waits or isn't streamed, sends heartbeats, so that the same holds for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from deepseek_triton.ensemble.engine.sequence import Request

HEARTBEATS = 4  # in the time after which a silent client is given up
LATENCY_WEIGHT = 0.1  # of the newest acknowledgement in their moving average
LATENCY_MARGIN = 8  # where everybody's acknowledgements are slow, nobody has gone

# Responses of one stream on their way to the detokenizer. One would wait for each acknowledgement; with two, the next
# is under way meanwhile, and what is ready while both are out travels together.
MAX_UNACKNOWLEDGED = 2


class Acknowledgements(Protocol):
    """Where the detokenizer says what it has received."""

    def drain(self) -> Iterable[int]:
        """Stream ids, one for each response received since the last call."""


class Liveness:
    """Judges requests by what was sent to them and acknowledged; times are seconds.

    Args:
        cancel_after_s: a request whose client has gone is found after so long at most.
    """

    def __init__(self, cancel_after_s: float) -> None:
        self._heartbeat_s = cancel_after_s / HEARTBEATS
        self._patience_s = cancel_after_s - self._heartbeat_s
        self._latency_s = 0.0

    def sent(self, request: Request, now: float) -> None:
        """A response has gone out."""
        request.last_sent_at = now
        if request.expects_acknowledgement:
            request.unacknowledged.append(now)

    def acknowledged(self, request: Request, now: float) -> None:
        """The oldest response that was out has been received."""
        if request.unacknowledged:
            latency = now - request.unacknowledged.pop(0)
            self._latency_s += LATENCY_WEIGHT * (latency - self._latency_s)

    def may_send(self, request: Request) -> bool:
        """Whether the client keeps up; if not, what is ready waits and travels together."""
        return len(request.unacknowledged) < MAX_UNACKNOWLEDGED

    def needs_heartbeat(self, request: Request, now: float) -> bool:
        """Whether too much time has passed without anything that could be acknowledged."""
        if not request.expects_acknowledgement or request.unacknowledged:
            return False
        return now - request.last_sent_at > self._heartbeat_s

    def is_abandoned(self, request: Request, now: float) -> bool:
        """Whether the client has gone."""
        if request.sink.is_cancelled():
            return True
        if not request.unacknowledged:
            return False
        return now - request.unacknowledged[0] > max(self._patience_s, LATENCY_MARGIN * self._latency_s)
