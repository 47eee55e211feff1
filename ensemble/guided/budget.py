"""The CPU time that the guides of one request may take.

llguidance can't be interrupted: its own limits bound one token's mask, and these end a request whose masks are dear
again and again. CPU time, unlike elapsed time, doesn't depend on what else the machine does.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from deepseek_triton.ensemble.guided.errors import GuideError


@dataclass(frozen=True)
class GuideLimits:
    """Limits in seconds of CPU time; the masks of 32 KB schemas take 0.02 ms to 1.5 ms on one core.

    per_token: for one token. total, plus `more_per_token` for each token: for a request.
    slow: from here on a mask is slow, and the request's further masks are computed at low priority.
    """

    per_token: float = 0.5
    total: float = 1.0
    more_per_token: float = 0.002
    slow: float = 0.005


class GuideBudget:
    """What one request's guides have taken of their CPU time; thread-safe, for its sequences share it."""

    def __init__(self, limits: GuideLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._spent_s = 0.0
        self._num_tokens = 0
        self.is_slow = False  # whether a mask was slow

    def charge(self, cpu_s: float) -> None:
        """Count the CPU time of one token's mask.

        Raises:
            GuideError: the request's guides have taken more than they may.
        """
        limits = self._limits
        with self._lock:
            self._spent_s += cpu_s
            self._num_tokens += 1
            allowed_s = limits.total + limits.more_per_token * self._num_tokens
            self.is_slow = self.is_slow or cpu_s >= limits.slow
        if cpu_s > limits.per_token:
            raise GuideError(
                f"the guide has taken {cpu_s:.1f} s of CPU time for one token, more than {limits.per_token:g} s: "
                "simplify it"
            )
        if self._spent_s > allowed_s:
            raise GuideError(
                f"the guide has taken {self._spent_s:.1f} s of CPU time for {self._num_tokens} tokens, more than "
                f"{limits.total:g} s and {1e3 * limits.more_per_token:g} ms a token: simplify it"
            )
