"""A verdict: a figure and its limit. Service levels and validity checks are lists of verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """`value` must be at most `limit`; None: there is no figure. `why` says what it means if it isn't."""

    name: str
    value: float | None
    limit: float
    unit: str  # "" for a plain number
    why: str

    @property
    def is_met(self) -> bool:
        """Whether the limit holds; a missing figure doesn't meet it."""
        return self.value is not None and self.value <= self.limit

    def sentence(self) -> str:
        """The figure and its limit as one line of text."""
        return f"{self.name}: {amount(self.value, self.unit)}, limit {amount(self.limit, self.unit)}"


def amount(value: float | None, unit: str = "") -> str:
    """A number with its unit: three significant digits; seconds below 1 as milliseconds."""
    if value is None:
        return "no figure"
    if math.isinf(value):
        return "failed"
    if unit == "s" and value != 0 and abs(value) < 1:
        value, unit = value * 1e3, "ms"
    if abs(value) < 1000:
        value = float(f"{value:.3g}")
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    number = f"{value:,.0f}" if value == round(value) else f"{value:,.{digits}f}"
    return f"{number} {unit}".strip()
