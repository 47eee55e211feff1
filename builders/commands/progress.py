"""How far each stage of a command's work is, on standard error: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from deepseek_triton.clients.printable import printable

BYTES = ("weights", "download")  # stages that count bytes
UNITS = {"calibrate": " layers", "quantize": " layers", "rank layers": " layers", "generate": " tokens",
    "rank": " layers", "measure": " layers", "write": " tensors", "train": " steps"}  # fmt: skip
# In a file: a line at each tenth of a stage, but none sooner than this after the one before, in seconds.
LINE_EVERY_S = 5.0


class ProgressDisplay:
    """A context manager. `report` shows how far a stage is, `say` prints a line above it."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._what = ""
        self._shown: _Bar | _Lines | None = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(is_done=kind is None)

    def report(self, what: str, done: int, total: int) -> None:
        """Stage `what` has done so much of `total`: bytes for those of `BYTES`, else a number of things."""
        # Weights are written between the layers that are quantised: the layers are what takes the time.
        if self._is_quiet or (what == "weights" and self._what == "quantize"):
            return
        if what != self._what or self._shown is None:
            self.close(is_done=True)
            self._shown = (_Bar if sys.stderr.isatty() else _Lines)(what, total)
            self._what = what
        # A total may be an estimate, as that of the weights is: nothing is more than done.
        self._shown.update(min(done, total), total)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._is_quiet:
            return
        from tqdm import tqdm

        tqdm.write(printable(line), file=sys.stderr)

    def close(self, *, is_done: bool = False) -> None:
        """End the stage; unless it is done, its bar stays as it is."""
        if self._shown is not None:
            self._shown.close(is_done=is_done)
            self._shown = None


class _Bar:
    """A bar that a terminal shows in one line."""

    def __init__(self, what: str, total: int) -> None:
        from tqdm import tqdm

        is_bytes = what in BYTES
        unit = "B" if is_bytes else UNITS.get(what, "")
        self._bar: Any = tqdm(total=total, desc=what, unit=unit, unit_scale=is_bytes, unit_divisor=1024)

    def update(self, done: int, total: int) -> None:
        self._bar.total = total  # a download learns it as it goes
        self._bar.update(done - self._bar.n)

    def close(self, *, is_done: bool) -> None:
        if is_done:
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()


class _Lines:
    """A line at each tenth of a stage that takes long."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._tenths = 0
        self._told_at = time.monotonic()

    def update(self, done: int, total: int) -> None:
        tenths = 10 * done // total if total else 0
        now = time.monotonic()
        if tenths > self._tenths and now - self._told_at >= LINE_EVERY_S:
            self._tenths, self._told_at = tenths, now
            print(f"{self._what}: {10 * tenths} %", file=sys.stderr, flush=True)

    def close(self, *, is_done: bool) -> None:
        """Nothing is left to tell."""
