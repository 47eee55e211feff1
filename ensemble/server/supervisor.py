"""Start a tritonserver again when it ends by itself, up to a number of restarts in a time.

It knows nothing of what the server serves.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer

MAX_RESTARTS = 3
WINDOW_S = 60.0


def supervise(
    server: TritonServer,
    *,
    on_ready: Callable[[TritonServer], None],
    on_restart: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run `server` until interrupted; a restarted server keeps its ports.

    Args:
        on_ready: called once, when the server first answers.
        on_restart: called with the reason before each restart.

    Raises:
        ServerError: the server can't be started, or has ended MAX_RESTARTS + 1 times within WINDOW_S seconds.
    """
    ends: deque[float] = deque(maxlen=MAX_RESTARTS)
    with server:
        on_ready(server)
        while True:
            status = server.wait()
            reason = server.why_it_ended(status)
            now = clock()
            if len(ends) == MAX_RESTARTS and now - ends[0] < WINDOW_S:
                raise ServerError(f"{reason}; it has been started {MAX_RESTARTS + 1} times: giving up")
            ends.append(now)
            on_restart(reason)
            server.restart()
