"""The validated options of tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from deepseek_triton.builders.errors import BuildError

LOWEST = {"clients": 1, "max_tokens": 1, "rounds": 5}  # fewer rounds: differences of one sign may well be chance
NUM_CANDIDATES = 2  # measured again in every round, besides the initial configuration
ROUNDS = 8


class TuneError(BuildError):
    """Tuning can't start or continue; the message is one line."""


@dataclass(frozen=True)
class TuneOptions:
    """The options of a tuning run.

    p99_ms: limit of the 99th percentile of the request latency.
    clients: number of concurrent clients.
    seconds: duration of each measurement.
    rounds: measurements of each candidate before the decision.
    budget_s: total time; a measurement that would exceed it isn't started.
    texts: file with one text per line; None: built-in texts.
    labels: for a scoring model without default labels.
    max_tokens: generated tokens per request.
    output: directory of journal, tables and plot.
    is_dry: don't change the repository.
    """

    name: str
    repository: Path
    p99_ms: float
    clients: int = 16
    seconds: float = 10.0
    rounds: int = ROUNDS
    budget_s: float = 900.0
    texts: Path | None = None
    labels: tuple[str, ...] = ()
    max_tokens: int = 32
    output: Path | None = None
    is_dry: bool = False

    def __post_init__(self) -> None:
        for name in ("p99_ms", "seconds", "budget_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TuneError(f"{name} is {value!r}, must be finite and above 0")
        for name, lowest in LOWEST.items():
            if getattr(self, name) < lowest:
                raise TuneError(f"{name} is {getattr(self, name)}, must be at least {lowest}")

    @property
    def directory(self) -> Path:
        """The directory of journal, tables and plot."""
        return self.output or Path(f"tune-{self.name}")

    @property
    def num_confirming(self) -> int:
        """Maximum number of measurements in all rounds."""
        return self.rounds * (1 + NUM_CANDIDATES)
