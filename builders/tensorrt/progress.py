"""Report TensorRT's progress as one growing number, and let Ctrl-C stop a build.

TensorRT reports nested phases from its own threads. The tracker turns them into thousandths of the whole; it doesn't
know what is built.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

# As `Report` of builders/repository/options.py: the name of what is done now, its progress and total.
CompileProgress = Callable[[str, int, int], None]
TOTAL = 1000
T = TypeVar("T")


@dataclass
class Phase:
    """A phase that has begun: its parent's name, its number of steps, and how many of them are done."""

    parent: str | None
    num_steps: int
    num_done: int = 0


class ProgressTracker:
    """Pass the fraction that is done to `report`; `cancel` ends the build at its next step."""

    def __init__(self, report: CompileProgress | None = None, what: str = "engine") -> None:
        self._report, self._what = report, what
        self._phases: dict[str, Phase] = {}
        self._lock = threading.Lock()
        self._reported = -1
        self._is_cancelled = False
        self.error: BaseException | None = None

    def cancel(self) -> None:
        """Ask TensorRT to stop."""
        self._is_cancelled = True

    def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
        """Record that a phase begins."""
        with self._lock:
            self._phases[name] = Phase(parent or None, max(1, num_steps))

    def step_complete(self, name: str, step: int) -> bool:
        """Record that a step of a phase is done; returning False stops the build."""
        with self._lock:
            if name in self._phases:
                self._phases[name].num_done = step + 1
            self._tell(self._fraction())
        return not self._is_cancelled

    def phase_finish(self, name: str) -> None:
        """Record that a phase ends, whether all its steps were done or not."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None and not self._is_cancelled:
                self._tell(1.0)

    def _fraction(self) -> float:
        roots = [
            name for name, phase in self._phases.items() if phase.parent == name or phase.parent not in self._phases
        ]
        return max((self._done(name) for name in roots), default=0.0)

    def _done(self, name: str) -> float:
        phase = self._phases[name]
        children = [child for child, other in self._phases.items() if other.parent == name and child != name]
        inner = max(map(self._done, children), default=0.0)
        return min(1.0, (phase.num_done + inner) / phase.num_steps)

    def _tell(self, fraction: float) -> None:
        done = int(fraction * TOTAL)
        if self._report is None or done <= self._reported or self._is_cancelled:
            return
        self._reported = done
        try:
            self._report(self._what, done, TOTAL)
        except BaseException as error:  # an exception must not travel through TensorRT's C++ frames
            self.error, self._is_cancelled = error, True


def make_monitor(api: Any, tracker: ProgressTracker) -> Any:
    """An `api.IProgressMonitor` that calls `tracker`."""

    def initialise(self: Any) -> None:
        api.IProgressMonitor.__init__(self)

    def phase_start(_: Any, name: str, parent: str | None, num_steps: int) -> None:
        tracker.phase_start(name, parent, num_steps)

    def step_complete(_: Any, name: str, step: int) -> bool:
        return tracker.step_complete(name, step)

    def phase_finish(_: Any, name: str) -> None:
        tracker.phase_finish(name)

    methods = {
        "__init__": initialise,
        "phase_start": phase_start,
        "step_complete": step_complete,
        "phase_finish": phase_finish,
    }
    return type("Monitor", (api.IProgressMonitor,), methods)()


def run_cancellable(work: Callable[[], T], tracker: ProgressTracker) -> T:
    """Run `work` on another thread; an interrupt here cancels it and waits until it has ended.

    Python handles signals on the main thread alone, which would otherwise be in C++ for minutes.

    Raises:
        KeyboardInterrupt, or whatever `work` or the progress callback raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="engine-build")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        tracker.cancel()
        thread.join()
        raise
    if failed := tracker.error or next(iter(errors), None):
        raise failed
    return results[0]
