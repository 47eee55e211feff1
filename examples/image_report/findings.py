"""The findings that the classifier knows, and logits → calibrated findings.

Logits enter, statements with probabilities leave. They are calibrated by temperature scaling: each finding's logit is
divided by a temperature that was fitted on tiles which the training didn't see.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

FINDINGS = ("hypercellularity", "mitotic_figures", "necrosis", "inflammation", "pleomorphism")
Status = Literal["present", "absent", "uncertain"]
STATUSES: tuple[Status, ...] = get_args(Status)
CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Finding:
    """What is said of one finding. probability: that it is there, calibrated, rounded to two digits."""

    name: str
    status: Status
    probability: float


@dataclass(frozen=True)
class TemperatureScaling:
    """How logits become findings.

    temperatures: above 0, in the order of FINDINGS. certain_from: a finding is present from this probability on, absent
    up to 1 minus it, and uncertain between; above 0.5, at most 1.
    """

    temperatures: tuple[float, ...]
    certain_from: float = 0.8

    def __post_init__(self) -> None:
        """Check the values. Raises `ValueError`."""
        if len(self.temperatures) != len(FINDINGS):
            raise ValueError(f"temperatures must be {len(FINDINGS)} numbers, got {len(self.temperatures)}")
        if not all(math.isfinite(value) and value > 0 for value in self.temperatures):
            raise ValueError(f"temperatures must be finite and above 0, got {self.temperatures}")
        if not 0.5 < self.certain_from <= 1:
            raise ValueError(f"certain_from must be above 0.5 and at most 1, got {self.certain_from}")

    @classmethod
    def load(cls, path: Path) -> TemperatureScaling:
        """Read what `save` wrote. Raises `ValueError`, which names the file."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(map(float, fields["temperatures"])), float(fields["certain_from"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error!r}") from error

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        fields = {"temperatures": list(self.temperatures), "certain_from": self.certain_from}
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def findings(self, logits: Sequence[float]) -> tuple[Finding, ...]:
        """Every finding, in the order of FINDINGS. Raises `ValueError` for logits that are none."""
        if len(logits) != len(FINDINGS) or not all(map(math.isfinite, logits)):
            raise ValueError(f"logits must be {len(FINDINGS)} finite numbers, got {list(logits)}")
        probabilities = (
            round(_sigmoid(logit / temperature), 2)
            for logit, temperature in zip(logits, self.temperatures, strict=True)
        )
        return tuple(Finding(name, self._status(p), p) for name, p in zip(FINDINGS, probabilities, strict=True))

    def _status(self, probability: float) -> Status:
        if probability >= self.certain_from:
            return "present"
        return "absent" if probability <= round(1 - self.certain_from, 9) else "uncertain"


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, value))))
