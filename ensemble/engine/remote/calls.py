"""Calls of another, decoupled model of the same server, from a Python model.

When a call is over, Triton's Python backend lets go of its responses in a thread of its own. If nobody else has them
any more, it frees them there: before 24.12 without Python's lock, so that memory is damaged and the process dies some
calls later; since then with it, but under a mutex that `exec` takes while it has the lock, so that both may wait for
ever (https://github.com/triton-inference-server/python_backend/pull/390; `src/pb_stub.cc` as of July 2026). So they are
kept here until Triton has let go.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

KEPT_S = 3.0  # after a call's end; Triton lets go of it within milliseconds, and each response takes shared memory
LAST_KEPT_S = 0.5  # of the last ones, at the end


class Calls:
    """Calls models, and keeps what they answered for KEPT_S or a little longer; for any number of threads.

    clock, sleep: of seconds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep, self._lock = clock, sleep, threading.Lock()
        self._kept: deque[tuple[float, Any]] = deque()  # when a call ended, and its responses
        self._is_closed = False

    @contextmanager
    def responses(self, request: Any) -> Iterator[Iterator[Any]]:
        """Send a `pb_utils.InferenceRequest`; its responses, one after the other.

        A call whose responses weren't all taken is cancelled where Triton can do so (24.10 can't), and the others are
        waited for: only then is it over for Triton.
        """
        responses, is_over = request.exec(decoupled=True), False

        def each() -> Iterator[Any]:
            nonlocal is_over
            yield from responses
            is_over = True

        try:
            yield each()
        finally:
            if not is_over:
                if hasattr(responses, "cancel"):
                    responses.cancel()
                for _ in responses:
                    pass
            self._keep(responses)

    def close(self) -> None:
        """Let go of all responses: those that are left when the process ends would be freed after Triton's memory."""
        with self._lock:
            self._is_closed = True
            kept, self._kept = self._kept, deque()
        if kept:
            self._sleep(LAST_KEPT_S)

    def _keep(self, responses: Any) -> None:
        """Keep these, and let go of those that were kept long enough."""
        now, old = self._clock(), []
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                self._kept.append((now, responses))
                while self._kept[0][0] <= now - KEPT_S:
                    old.append(self._kept.popleft())
        if is_closed:
            self._sleep(LAST_KEPT_S)
