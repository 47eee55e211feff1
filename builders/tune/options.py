"""What a user asks of tuning: validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from deepseek_triton.builders.tune.confirm import MIN_ROUNDS, NUM_CANDIDATES, ROUNDS
from deepseek_triton.builders.tune.space import TuneError


@dataclass(frozen=True)
class TuneOptions:
    """What to tune, and within what.

    p99_ms: the limit of the 99th percentile of a request's latency. clients: asking at once. seconds: of each
    measurement. rounds: measurements of each configuration before one is chosen. budget_s: no measurement is begun that
    would end after it. texts: a file, a text a line; None: built-in ones. labels: for a scoring model built without.
    max_tokens: generated for each request. output: directory of journal, tables and plot. is_dry: the repository stays
    as it is.
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
        for name, lowest in (("clients", 1), ("max_tokens", 1), ("rounds", MIN_ROUNDS)):
            if getattr(self, name) < lowest:
                raise TuneError(f"{name} is {getattr(self, name)}, must be at least {lowest}")

    @property
    def directory(self) -> Path:
        """Where journal, tables and plot go."""
        return self.output or Path(f"tune-{self.name}")

    @property
    def num_confirming(self) -> int:
        """Measurements of all rounds, at most."""
        return self.rounds * (1 + NUM_CANDIDATES)
