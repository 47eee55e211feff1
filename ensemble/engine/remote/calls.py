"""Calls of another, decoupled model of the same server, from a Python model.

Triton's Python backend before 25.02 lets go of a finished call in a thread of its own, without Python's lock. Where
nobody else has the responses any more, it frees them there: memory is damaged, and some calls later the process dies.
So they are kept here for a while. Triton's mend is https://github.com/triton-inference-server/python_backend/pull/390.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

KEPT_S = 10.0  # after a call's end; Triton lets go of it within milliseconds


class Calls:
    """Calls models, and keeps what they answered for KEPT_S; for any number of threads.

    clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._kept: deque[tuple[float, Any]] = deque()  # when a call ended, and its responses

    @contextmanager
    def responses(self, request: Any) -> Iterator[Any]:
        """Send a `pb_utils.InferenceRequest`; its responses, to be iterated over."""
        responses = request.exec(decoupled=True)
        try:
            yield responses
        finally:
            self._keep(responses)

    def close(self) -> None:
        """Let go of all responses: those that are left when the process ends would be freed after Triton's memory."""
        with self._lock:
            self._kept.clear()

    def _keep(self, responses: Any) -> None:
        """Keep these, and let go of those that were kept long enough."""
        now, old = self._clock(), []
        with self._lock:
            self._kept.append((now, responses))
            while self._kept[0][0] <= now - KEPT_S:
                old.append(self._kept.popleft())
