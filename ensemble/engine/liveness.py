"""Detects disconnected clients by acknowledgements and heartbeats.

The detokenizer acknowledges every response that it receives, and Triton passes it none after the client has
disconnected. A request without output, because it waits or isn't streamed, sends heartbeats to be acknowledged.
On a machine that is too busy to run what lies between, nothing arrives, and nobody has gone. So a client counts as gone
when a response to another one, sent clearly later, has arrived. Where there is no other, the detokenizer must have run
for longer than the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

from deepseek_triton.ensemble.engine.sequence import Request

HEARTBEATS = 4  # per cancel_after_s
LATENCY_WEIGHT = 0.1  # weight of the newest acknowledgement in the moving average of the latency
LATER = 0.5  # of the patience: a response that was sent so much later than another one doesn't overtake it
LIFE = 1.5  # times the patience, for which the detokenizer must have run if no other response tells
LATENCY_MARGIN = 8  # a client is given up no sooner than after this many average latencies

# Maximum responses of one stream in flight to the detokenizer. With two, the second is sent while the first awaits its
# acknowledgement; tokens that become ready meanwhile are sent in one response.
MAX_UNACKNOWLEDGED = 2


class Acknowledgements(Protocol):
    """The channel by which the detokenizer acknowledges responses."""

    def drain(self) -> Iterable[int]:
        """Return the stream ids of the responses received since the last call, one per response."""

    def life_since(self, began: float) -> float:
        """Seconds since `began` in which the detokenizer ran; inf: it isn't known."""


class Liveness:
    """Decides by sent and acknowledged responses whether a request's client is alive; times are in seconds.

    Args:
        cancel_after_s: maximum time until a disconnected client is detected while other clients are served; alone it
            takes up to half as long again.
        life_since: see Acknowledgements.
    """

    def __init__(self, cancel_after_s: float, life_since: Callable[[float], float] = lambda began: math.inf) -> None:
        self._life_since = life_since
        self._heartbeat_s = cancel_after_s / HEARTBEATS
        self._patience_s = cancel_after_s - self._heartbeat_s
        self._latency_s = 0.0
        self._newest_arrived = -math.inf  # when the newest response that has arrived was sent

    def sent(self, request: Request, now: float) -> None:
        """Record that a response was sent."""
        request.last_sent_at = now
        if request.expects_acknowledgement:
            request.unacknowledged.append(now)

    def acknowledged(self, request: Request, now: float) -> None:
        """Record the acknowledgement of the oldest response in flight."""
        if request.unacknowledged:
            sent = request.unacknowledged.pop(0)
            self._newest_arrived = max(self._newest_arrived, sent)
            latency = now - sent
            self._latency_s += LATENCY_WEIGHT * (latency - self._latency_s)

    def may_send(self, request: Request) -> bool:
        """Return whether another response may be sent; if not, ready tokens wait and are sent together."""
        return len(request.unacknowledged) < MAX_UNACKNOWLEDGED

    def needs_heartbeat(self, request: Request, now: float) -> bool:
        """Return whether a heartbeat is due: nothing is in flight, and nothing was sent for a while."""
        if not request.expects_acknowledgement or request.unacknowledged:
            return False
        return now - request.last_sent_at > self._heartbeat_s

    def is_abandoned(self, request: Request, now: float) -> bool:
        """Return whether the client has disconnected."""
        if request.sink.is_cancelled():
            return True
        if not request.unacknowledged:
            return False
        patience = max(self._patience_s, LATENCY_MARGIN * self._latency_s)
        sent = request.unacknowledged[0]
        if now - sent <= patience:
            return False
        return self._newest_arrived - sent >= LATER * patience or self._life_since(sent) >= LIFE * patience
