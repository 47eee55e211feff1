"""Breaker: stops sending requests of one model to one server that fails them, and tries it again after a while.

purgatory isn't used: half-open, its breaker lets everything through, not single trials; what it is told to leave out
counts as a success, so that a client's wrong request would close it; and its time is that of the wall clock.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deepseek_triton.gateway.backend.verdict import Verdict

log = logging.getLogger(__name__)

State = Literal["closed", "open", "half_open"]


@dataclass(frozen=True)
class BreakerSettings:
    """failures: in a row, that open it. open_s: seconds until trials. trials: at one time, half-open."""

    failures: int = 5
    open_s: float = 30.0
    trials: int = 1


class Breaker:
    """Closed, it counts failures in a row. Open, it refuses. Half-open, the end of a trial closes or opens it.

    Only verdicts "failed" and "answered" matter: neither a client's fault nor a full queue says that a server is ill.

    Args:
        name: in the log.
        clock: monotonic time in seconds.
        tell: called with each new state.
    """

    def __init__(
        self,
        name: str,
        settings: BreakerSettings,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[State], None] = lambda state: None,
    ) -> None:
        self._name, self._settings, self._clock, self._tell = name, settings, clock, tell
        self.state: State = "closed"
        self._num_failures = 0
        self._opened_at = -math.inf
        self._num_trials = 0
        self._tried_at = -math.inf
        self._period = 0  # grows with each change of the state: ends of requests of an earlier one don't matter

    def wait_s(self) -> float:
        """Seconds until a request may go; 0: now."""
        if self.state == "closed":
            return 0.0
        now = self._clock()
        if self.state == "open":
            return max(self._opened_at + self._settings.open_s - now, 0.0)
        if self._num_trials < self._settings.trials:
            return 0.0
        return max(self._tried_at + self._settings.open_s - now, 0.0)  # a trial that hangs blocks no others for ever

    def try_now(self) -> None:
        """Its server is another one, or was started again: a trial needs no waiting."""
        if self.state == "open":
            self._opened_at = -math.inf

    def take(self) -> Permit:
        """Let one request go, which `wait_s` has allowed; its end must be told."""
        if self.state == "open":
            self._change("half_open")
        if self.state == "half_open":
            self._num_trials += 1
            self._tried_at = self._clock()
        return Permit(self, self._period)

    def works(self, period: int) -> None:
        """A request of `period` has begun to be answered."""
        if period == self._period and self.state == "half_open":
            self._change("closed")

    def ended(self, period: int, verdict: Verdict) -> None:
        """A request of `period` has ended so."""
        if period != self._period:
            return
        if self.state == "half_open":
            self._num_trials -= 1
        if verdict == "answered":
            self._num_failures = 0
            if self.state == "half_open":
                self._change("closed")
        elif verdict == "failed":
            self._num_failures += 1
            if self.state == "half_open" or self._num_failures >= self._settings.failures:
                self._change("open")

    def _change(self, state: State) -> None:
        if state == "open":
            self._opened_at = self._clock()
            log.warning("the breaker of %s opens for %g s", self._name, self._settings.open_s)
        elif state == "closed":
            log.info("the breaker of %s is closed again", self._name)
        self.state = state
        self._num_failures = self._num_trials = 0
        self._period += 1
        self._tell(state)


@dataclass(frozen=True)
class Permit:
    """One request that a breaker has let go."""

    breaker: Breaker
    period: int

    def works(self) -> None:
        """Its answer has begun: the server works, however long the rest takes."""
        self.breaker.works(self.period)

    def ended(self, verdict: Verdict) -> None:
        """It has ended."""
        self.breaker.ended(self.period, verdict)
