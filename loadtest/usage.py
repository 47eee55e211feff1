"""Who used this machine's processors during a run: /proc in, CPU seconds of generator, server and all others out.

A run beside other work measures that work too. What the machine did in all comes from /proc/stat, the generator's and
the server's part from their processes; the rest was somebody else's. A server on another machine has no part here.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil


@dataclass(frozen=True)
class Usage:
    """One reading. CPU seconds are of all cores, and grow."""

    at_s: float
    busy_s: float  # of the whole machine: everything but idle and waiting for disks; stolen time counts
    generator_s: float
    server_s: float | None  # None: the server is not on this machine, or its processes are not ours to see
    server_bytes: int | None  # resident memory of its processes


class Watch:
    """Reads the usage of this process, and of the server that listens on a port of this machine."""

    def __init__(self, port: int | None) -> None:
        self._server = server_processes(port) if port is not None else []

    def read(self, at_s: float) -> Usage:
        """Read now. A server whose processes end is no longer seen."""
        times = psutil.cpu_times()
        # Guests' time is in user and nice already.
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        seconds, resident = 0.0, 0
        try:
            for process in self._server:
                used = process.cpu_times()
                seconds += used.user + used.system
                resident += process.memory_info().rss
        except psutil.Error:
            self._server = []
        is_seen = bool(self._server)
        return Usage(at_s, busy, time.process_time(), seconds if is_seen else None, resident if is_seen else None)


def local_port(url: str) -> int | None:
    """The port of a URL, or of HOST:PORT, that names this machine; None: it names another one."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    return parts.port if parts.hostname in ("localhost", "127.0.0.1", "::1") else None


def server_processes(port: int) -> list[psutil.Process]:
    """The process that listens on a port, and its descendants: a tritonserver's models are its children."""
    try:
        owners = {each.pid for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN and
                  each.laddr.port == port and each.pid not in (None, os.getpid())}  # fmt: skip
        first = [psutil.Process(pid) for pid in sorted(owners)]
        return [*first, *(child for process in first for child in process.children(recursive=True))]
    except psutil.Error:
        return []


@dataclass(frozen=True)
class Shares:
    """Parts of the machine's whole processor time, 0 … 1, in one stretch of time."""

    generator: float
    server: float | None
    others: float | None  # None: the server's part is unknown, so theirs is too


def shares(before: Usage, after: Usage, cores: int, *, is_server_here: bool) -> Shares | None:
    """Who used what between two readings; None of no time."""
    whole = (after.at_s - before.at_s) * cores
    if whole <= 0:
        return None
    generator = after.generator_s - before.generator_s
    server = None if before.server_s is None or after.server_s is None else after.server_s - before.server_s
    others = None if server is None and is_server_here else after.busy_s - before.busy_s - generator - (server or 0.0)
    return Shares(
        generator=generator / whole,
        server=None if server is None else server / whole,
        # Processes' clocks tick apart from the machine's: a hundredth of a second less than nothing may come out.
        others=None if others is None else max(others, 0.0) / whole,
    )


def highest_generator_core(readings: Sequence[Usage], stretch_s: float) -> float | None:
    """The generator's use of one core, 0 … 1, in its busiest stretch of `stretch_s`; of all there is, if less."""
    if len(readings) < 2:
        return None
    rates = []
    for i, later in enumerate(readings):
        earlier = next((each for each in reversed(readings[:i]) if later.at_s - each.at_s >= stretch_s), None)
        if earlier is not None:
            rates.append((later.generator_s - earlier.generator_s) / (later.at_s - earlier.at_s))
    first, last = readings[0], readings[-1]
    if not rates and last.at_s > first.at_s:
        rates = [(last.generator_s - first.generator_s) / (last.at_s - first.at_s)]
    return max(rates, default=None)


@dataclass(frozen=True)
class UsageCourse:
    """Percent of the machine, and MiB, between each two edges of a run's course."""

    generator_percent: list[float | None]
    server_percent: list[float | None]
    others_percent: list[float | None]
    server_mib: list[float | None]


def course(readings: Sequence[Usage], edges: Sequence[float], cores: int, *, is_server_here: bool) -> UsageCourse:
    """The readings nearest to the borders are compared."""
    if not readings:
        nothing: list[float | None] = [None] * (len(edges) - 1)
        return UsageCourse(nothing, nothing, nothing, nothing)
    nearest = [min(readings, key=lambda reading: abs(reading.at_s - edge)) for edge in edges]
    steps = [shares(a, b, cores, is_server_here=is_server_here) for a, b in itertools.pairwise(nearest)]

    def percent(name: str) -> list[float | None]:
        values = [getattr(step, name) if step else None for step in steps]
        return [None if value is None else 100 * value for value in values]

    memory = [None if reading.server_bytes is None else reading.server_bytes / 2**20 for reading in nearest[1:]]
    return UsageCourse(percent("generator"), percent("server"), percent("others"), memory)
