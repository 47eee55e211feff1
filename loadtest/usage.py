"""Use of this machine's processors during a run: /proc in; CPU seconds of generator, server and other programs out.

Other programs on the machine slow server and generator. The machine's total comes from /proc/stat, the generator's and
the server's part from their processes, and other programs have the rest. A server on another machine has no part here.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import psutil


@dataclass(frozen=True)
class Usage:
    """One reading. CPU seconds are summed over all cores and only grow."""

    at_s: float
    busy_s: float  # the whole machine's: all time but idle and iowait; stolen time counts
    generator_s: float
    server_s: float | None  # None: the server isn't on this machine, or its processes belong to another user
    server_bytes: int | None  # resident memory of the server's processes


class Watch:
    """Reads the usage of this process, and of the servers that listen on ports of this machine."""

    def __init__(self, *ports: int | None) -> None:
        self._server = [each for port in ports if port is not None for each in server_processes(port)]

    def read(self, at_s: float) -> Usage:
        """Take a reading. A server with an ended process is left out from then on."""
        import psutil

        times = psutil.cpu_times()
        # Time of virtual guests is contained in user and nice.
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
    """The port of a URL or of HOST:PORT if the host is this machine, else None."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    return parts.port if parts.hostname in ("localhost", "127.0.0.1", "::1") else None


def server_processes(port: int) -> list[psutil.Process]:
    """The process that listens on a port and its descendants: tritonserver runs Python models in child processes."""
    import psutil

    try:
        owners = {each.pid for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN and
                  each.laddr.port == port and each.pid not in (None, os.getpid())}  # fmt: skip
        first = [psutil.Process(pid) for pid in sorted(owners)]
        return [*first, *(child for process in first for child in process.children(recursive=True))]
    except psutil.Error:
        return []


@dataclass(frozen=True)
class Shares:
    """Shares of the machine's processor time in a period, 0 … 1."""

    generator: float
    server: float | None
    others: float | None  # None: the server's share is unknown, so that of other programs is, too


def shares(before: Usage, after: Usage, cores: int, *, is_server_here: bool) -> Shares | None:
    """The shares between two readings; None if no time lies between them."""
    whole = (after.at_s - before.at_s) * cores
    if whole <= 0:
        return None
    generator = after.generator_s - before.generator_s
    server = None if before.server_s is None or after.server_s is None else after.server_s - before.server_s
    others = None if server is None and is_server_here else after.busy_s - before.busy_s - generator - (server or 0.0)
    return Shares(
        generator=generator / whole,
        server=None if server is None else server / whole,
        # The clocks of processes and of the machine differ slightly: the difference may be 0.01 s below zero.
        others=None if others is None else max(others, 0.0) / whole,
    )


def highest_generator_core(readings: Sequence[Usage], stretch_s: float) -> float | None:
    """The generator's share of one core, 0 … 1, in its busiest `stretch_s` seconds, or in the whole run if shorter."""
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
    """Percent of the machine's processors, and MiB, in each step of the run."""

    generator_percent: list[float | None]
    server_percent: list[float | None]
    others_percent: list[float | None]
    server_mib: list[float | None]


def course(readings: Sequence[Usage], edges: Sequence[float], cores: int, *, is_server_here: bool) -> UsageCourse:
    """The usage between the edges (seconds), from the readings nearest to them."""
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
