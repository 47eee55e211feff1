"""A progress bar on standard error for each stage of a command's work."""

from __future__ import annotations

import sys
from typing import Any


class ProgressBar:
    """A context manager. `report` shows how far a stage is, `say` prints a line above the bar."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._bar: Any = None
        self._what = ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def report(self, what: str, done: int, total: int) -> None:
        """Stage `what` has done so much of `total`: bytes for "weights", else a number of things."""
        if self._is_quiet:
            return
        from tqdm import tqdm

        if what != self._what:
            self.close()
            is_bytes = what == "weights"
            self._bar = tqdm(
                total=total, desc=what, unit="B" if is_bytes else "", unit_scale=is_bytes, unit_divisor=1024
            )
            self._what = what
        self._bar.update(done - self._bar.n)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._is_quiet:
            return
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
