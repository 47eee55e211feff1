"""Coordinate search: varies one parameter at a time around the best point, until no change improves it.

It takes the parameters' values and a function that measures a point, and returns all measured points. It knows nothing
of servers. Each point is measured once; confirm.py decides which point is best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepseek_triton.builders.tune.measurement import Measured, Measurement
from deepseek_triton.builders.tune.space import Point

# A smaller relative gain is likely noise and is ignored.
MIN_GAIN = 0.03
# A smaller relative loss may be noise that hides a gain: the search tries one value further.
MIN_LOSS = 0.1


@dataclass(frozen=True)
class Axis:
    """A parameter's name and the values to try, ascending."""

    name: str
    values: Sequence[int]


def is_within(result: Measurement, p99_limit_ms: float) -> bool:
    """Return whether the measurement succeeded with a 99th percentile within the limit."""
    return not result.failure and result.p99_ms <= p99_limit_ms


def is_better(result: Measurement, other: Measurement, p99_limit_ms: float, least: float = MIN_GAIN) -> bool:
    """Return whether `result` is better than `other` by more than `least` (relative).

    Within the limit a higher throughput is better; if both exceed the limit, a lower 99th percentile is.
    """
    if result.failure or other.failure:
        return bool(other.failure) and not result.failure
    within, other_within = is_within(result, p99_limit_ms), is_within(other, p99_limit_ms)
    if within != other_within:
        return within
    if within:
        return result.throughput > other.throughput * (1 + least)
    return result.p99_ms < other.p99_ms * (1 - least)


def search(
    axes: Sequence[Axis],
    start: Point,
    measure: Callable[[Point], Measurement | None],
    p99_limit_ms: float,
) -> list[Measured]:
    """Measure points until no neighbour of the best is better.

    Args:
        measure: returns None when the time is up; the search then returns the points measured so far.
    """
    found: dict[tuple[int, ...], Measured] = {}

    def at(point: Point) -> Measured | None:
        key = tuple(point[axis.name] for axis in axes)
        if key not in found:
            result = measure(point)
            if result is None:
                return None
            found[key] = Measured(dict(point), result)
        return found[key]

    best = at(start)
    is_improved = best is not None
    while best is not None and is_improved:
        is_improved = False
        for axis in axes:
            for step in (1, -1):
                last, may_look_on = best.point, True
                while (point := _neighbour(axis, last, step)) is not None:
                    candidate = at(point)
                    if candidate is None:
                        return list(found.values())
                    if is_better(candidate.result, best.result, p99_limit_ms):
                        best, is_improved, may_look_on = candidate, True, True
                    elif may_look_on and not is_better(best.result, candidate.result, p99_limit_ms, MIN_LOSS):
                        may_look_on = False
                    else:
                        break
                    last = point
    return list(found.values())


def _neighbour(axis: Axis, point: Point, step: int) -> dict[str, int] | None:
    index = list(axis.values).index(point[axis.name]) + step
    if not 0 <= index < len(axis.values):
        return None
    return {**point, axis.name: axis.values[index]}
