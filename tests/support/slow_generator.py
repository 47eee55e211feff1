"""A load generator that is too slow on purpose, for the checks that must find it out.

    python -m tests.support.slow_generator stall 0.2 0.1 PROFILE …

Its loop again and again stands still for the first number of seconds, then goes on for the second; with `burn` it
computes meanwhile instead of sleeping.
"""

from __future__ import annotations

import deepseek_triton.loadtest.gevent_patch  # noqa: F401  # isort: skip  # before everything else

import sys
import time

import gevent
from gevent import monkey

from deepseek_triton.loadtest.run import main


def be_slow(how: str, still_s: float, going_s: float) -> None:
    really_sleep = monkey.get_original("time", "sleep")
    while True:
        gevent.sleep(going_s)
        end = time.perf_counter() + still_s
        if how == "stall":
            really_sleep(still_s)
        while time.perf_counter() < end:
            pass


if __name__ == "__main__":
    gevent.spawn(be_slow, sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
