"""gevent's patches, in the one order that works: import this before anything else of a load generator's process.

Locust runs its users as greenlets. The standard library is patched first, then grpcio, whose waiting happens in C: its
own gevent mode moves that to native threads, taken from gevent's pool. Measured through it, the time to first token of
an idle server is a plain client's (tests/test_loadtest_clock.py). The pool is made large enough never to be what a
stream waits for.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import gevent  # noqa: E402
from grpc.experimental import gevent as grpc_gevent  # noqa: E402

MAX_THREADS = 128

grpc_gevent.init_gevent()
gevent.get_hub().threadpool.maxsize = MAX_THREADS
