"""Ranges of numbers, each with its rule in words. It knows nothing of requests."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_INT32 = 2**31 - 1
MAX_UINT64 = 2**64 - 1
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
DTYPE_LIMITS = (MAX_INT32, MAX_UINT64, MAX_FLOAT32)  # rules don't mention them


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, without `low` where `excludes_low`; only integers where both ends are `int`.

    rule: the range in words; it follows "must be ".
    """

    low: float
    high: float
    rule: str
    excludes_low: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether only integers are in the range."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def holds(self, value: float) -> bool:
        """Whether `value` is in the range; NaN is in none."""
        return self.low <= value <= self.high and not (self.excludes_low and value == self.low)

    def broken_rule(self, value: float) -> str:
        """The rule that a value outside the range breaks, in words that follow "must be "."""
        if self.high in DTYPE_LIMITS and self.high < value < math.inf:
            return f"at most {self.high}"
        return self.rule


def at_least(low: int) -> Range:
    """The INT32 values from `low` on."""
    return Range(low, MAX_INT32, f"at least {low}")


def between(low: float, high: float) -> Range:
    """The numbers from `low` to `high`."""
    return Range(low, high, f"{low:g} to {high:g}")


ANY_FLOAT = Range(-MAX_FLOAT32, MAX_FLOAT32, "a finite number")
POSITIVE_FLOAT = Range(0.0, MAX_FLOAT32, "a finite number above 0", excludes_low=True)
NON_NEGATIVE_FLOAT = Range(0.0, MAX_FLOAT32, "a finite number of at least 0")
