"""Start a tritonserver again when it ends by itself, or when one of its processes is dead or frozen.

It knows nothing of what the server serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from deepseek_triton.ensemble.server.backoff import Backoff
from deepseek_triton.ensemble.server.installation import ServerDiedError
from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer

SETTLED_S = 5.0  # a server that was ready for so long is started again without a longer wait
STABLE_S = 60.0  # one that was ready for so long counts as well again


def supervise(
    server: TritonServer,
    *,
    on_ready: Callable[[TritonServer], None],
    on_restart: Callable[[str, float], None],
    max_restarts: int | None = None,
    backoff: Backoff | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Run `server` until interrupted; a restarted server keeps its ports.

    A server that dies while it starts is started again too. One that refuses to start is not, unless it has been ready
    before: then whatever is in the way may go away.

    Args:
        on_ready: called once, when the server first answers.
        on_restart: called before each restart with the reason and the seconds until then.
        max_restarts: restarts in a row, none of which was ready for STABLE_S seconds, after which to give up; None:
            never give up.

    Raises:
        ServerError: the server refuses to start, or `max_restarts` are used up.
    """
    backoff = backoff or Backoff()
    has_been_ready, num_restarts = False, 0
    try:
        while True:
            try:
                server.start()
            except ServerError as error:
                if not has_been_ready and not isinstance(error, ServerDiedError):
                    raise
                reason = str(error)
            else:
                if not has_been_ready:
                    on_ready(server)
                has_been_ready, ready_at = True, clock()
                reason = server.wait_for_fault()
                if clock() - ready_at >= SETTLED_S:
                    backoff.reset()
                if clock() - ready_at >= STABLE_S:
                    num_restarts = 0
            server.stop()
            if num_restarts == max_restarts:
                raise ServerError(f"{reason}; giving up after {num_restarts} restarts")
            num_restarts += 1
            wait_s = backoff.next_s()
            on_restart(reason, wait_s)
            sleep(wait_s)
    finally:
        server.stop()
