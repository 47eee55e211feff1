"""How far the latest payments are from the training ones: the population stability index (PSI) of inputs and scores.

PSI = sum over bins of (actual - expected) * ln(actual / expected), of the shares of records in each bin. By the usual
rule below 0.1 nothing has changed, and from 0.25 on the model should be looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 10
MIN_SHARE = 1e-3  # of a bin without a record: its logarithm must be finite
WINDOW = 1000  # latest payments that are compared
SCORE = "score"


@dataclass(frozen=True)
class Reference:
    """The training payments' distribution.

    names: of the inputs, and SCORE last. edges: for each, the inner edges of its bins. shares: the share of records in
    each bin, one more than edges.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[float, ...], ...]
    shares: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, names: Sequence[str], values: NDArray[Any]) -> Reference:
        """Bins of about equally many of `values` [records, names]; of a number with few values, one bin for each."""
        edges, shares = [], []
        for column in np.asarray(values, np.float64).T:
            quantiles = np.quantile(column, np.linspace(0, 1, NUM_BINS + 1)[1:-1])
            distinct = np.unique(column)
            inner = (distinct[1:] + distinct[:-1]) / 2 if len(distinct) <= NUM_BINS else np.unique(quantiles)
            edges.append(tuple(inner.tolist()))
            shares.append(tuple(_shares(column, inner).tolist()))
        return cls(tuple(names), tuple(edges), tuple(shares))

    def psi(self, values: NDArray[Any]) -> dict[str, float]:
        """Name → PSI of `values` [records, names] against the reference."""
        found = {}
        for name, edges, expected, column in zip(
            self.names, self.edges, self.shares, np.asarray(values, np.float64).T, strict=True
        ):
            before = np.maximum(expected, MIN_SHARE)
            now = np.maximum(_shares(column, np.array(edges)), MIN_SHARE)
            found[name] = float(((now - before) * np.log(now / before)).sum())
        return found

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Reference:
        """Of `dataclasses.asdict`, through JSON. Raises `KeyError`."""
        rows = {name: tuple(map(tuple, table[name])) for name in ("edges", "shares")}
        return cls(tuple(table["names"]), **rows)


class DriftWindow:
    """The latest WINDOW payments, as a ring."""

    def __init__(self, reference: Reference, size: int = WINDOW) -> None:
        self._reference = reference
        self._values = np.zeros((size, len(reference.names)))
        self.num_seen = 0

    @property
    def num_records(self) -> int:
        """Records that are compared now."""
        return min(self.num_seen, len(self._values))

    def add(self, values: NDArray[Any]) -> None:
        """Take `values` [records, names], in the order of `Reference.names`."""
        for row in values:
            self._values[self.num_seen % len(self._values)] = row
            self.num_seen += 1

    def psi(self) -> dict[str, float]:
        """Name → PSI of the window; nothing before the first record."""
        return self._reference.psi(self._values[: self.num_records]) if self.num_seen else {}


def _shares(column: NDArray[Any], edges: NDArray[Any]) -> NDArray[Any]:
    counts = np.bincount(np.searchsorted(edges, column, side="right"), minlength=len(edges) + 1)
    return np.asarray(counts / max(len(column), 1))
