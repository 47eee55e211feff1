"""Apply gevent's patches in the order that works. A load generator's process must import this before anything else.

Locust runs its users as greenlets. The standard library is patched first, then grpcio, which waits in C: its gevent
mode moves the waiting to native threads of gevent's pool. The time to first token of an idle server is the same as a
plain client's (tests/loadtest/test_run.py). The pool is large enough that no stream waits for a thread.
"""

from __future__ import annotations

try:
    from gevent import monkey
except ModuleNotFoundError as error:
    from deepseek_triton.extras import explain_missing

    raise SystemExit(f"error: {explain_missing(error)}") from error

monkey.patch_all()

import gevent  # noqa: E402
from grpc.experimental import gevent as grpc_gevent  # noqa: E402

from deepseek_triton.quick_imports import collect_rarely  # noqa: E402

MAX_THREADS = 128

collect_rarely()
grpc_gevent.init_gevent()
gevent.get_hub().threadpool.maxsize = MAX_THREADS
# Ctrl-C reaches the main greenlet, which tells it; the hub would print a traceback of its own besides.
gevent.get_hub().NOT_ERROR = (*gevent.get_hub().NOT_ERROR, KeyboardInterrupt)
