"""What `promote` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.promotion.arm_figures import CanaryBounds

BY = ("caller", "request")


@dataclass(frozen=True)
class PromoteOptions:
    """What is promoted, and how.

    candidate: the checkpoint that the gate judged. report: the gate's. routes: the gateway's route file. gateways:
    their addresses, for their metrics. shares: of the candidate in percent, ascending to 100. stage_s: the least time
    of each. max_stage_s: the time in which a share must have had `bounds.min_requests`. drain_s: how long requests
    that run on the old model may take. keeps_old: leave the old model loaded. builds: build what the gate judged as a
    checkpoint alone.

    Raises:
        BuildError: a value out of range.
    """

    name: str
    candidate: Path
    report: Path
    repository: Path
    routes: Path
    gateways: tuple[str, ...]
    shares: tuple[float, ...] = (1, 10, 50, 100)
    stage_s: float = 60.0
    max_stage_s: float = 3600.0
    drain_s: float = 600.0
    by: str = BY[0]
    keeps_old: bool = False
    builds: bool = False
    bounds: CanaryBounds = field(default_factory=CanaryBounds)

    def __post_init__(self) -> None:
        rises = list(self.shares) == sorted(set(self.shares))
        if not self.shares or not rises or not self.shares[0] > 0 or self.shares[-1] != 100:
            raise BuildError(f"shares are {self.shares}, must rise from above 0 to 100")
        if not self.gateways:
            raise BuildError("no gateway is named: nobody could watch the candidate; give --gateway")
        if not 0 <= self.stage_s <= self.max_stage_s or self.drain_s <= 0:
            raise BuildError("stage-s must be at least 0 and at most max-stage-s, drain-s above 0")
        if self.bounds.min_requests < 1 or self.bounds.max_error_rate < 0 or self.bounds.max_latency_ratio <= 0:
            raise BuildError("min-requests must be at least 1, max-error-rate at least 0, max-latency-ratio above 0")
        if self.by not in BY:
            raise BuildError(f"by is {self.by!r}, must be one of {', '.join(BY)}")
