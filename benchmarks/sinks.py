"""What the engine's loop needs around it where nothing but a benchmark waits: a sink, and no acknowledgements."""

from __future__ import annotations

import math
import threading

from deepseek_triton.ensemble.engine.sequence import FailureKind


class EndedSink:
    """A sink whose `done` is set when its request ends; error: why it failed. `send` is its subclass's."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: str | None = None

    def fail(self, message: str, kind: FailureKind) -> None:
        """See Sink."""
        self.error = message
        self.done.set()

    def is_cancelled(self) -> bool:
        """See Sink."""
        return False


class Nobody:
    """Acknowledgements without a consumer: there are none."""

    def drain(self) -> list[int]:
        """See Acknowledgements."""
        return []

    def life_since(self, began: float) -> float:
        """See Acknowledgements."""
        return math.inf
