"""Coordinate search: one parameter after the other, up and down from the best so far, until nothing improves.

What enters is a space and something that measures a point; what leaves is every point that was measured. It knows
nothing of servers. One measurement of a point is good enough to find the way; which point is best, confirm.py decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepseek_triton.builders.tune.measurement import Measured, Measurement
from deepseek_triton.builders.tune.space import Point

# A difference below this is likely noise: the search doesn't follow it.
MIN_GAIN = 0.03
# A loss below this may be noise that hides a gain: the search looks one value further.
MIN_LOSS = 0.1


@dataclass(frozen=True)
class Axis:
    """A parameter's name and the values to try, ascending."""

    name: str
    values: Sequence[int]


def is_within(result: Measurement, p99_limit_ms: float) -> bool:
    """Whether every request was answered, and 99 in 100 of them in time."""
    return not result.failure and result.p99_ms <= p99_limit_ms


def is_better(result: Measurement, other: Measurement, p99_limit_ms: float, least: float = MIN_GAIN) -> bool:
    """Within the limit more throughput is better, by more than `least`; while none is within it, less latency."""
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
        measure: gives None when time is up: the search ends with what it has.
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
