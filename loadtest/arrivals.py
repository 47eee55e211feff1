"""Computes the arrival times of requests and the number of users from a profile's stages.

Open arrivals are a Poisson process whose rate follows the stages. The arrival times of a process with rate 1 are mapped
by the inverse of the rate's integral, which is exact for linear rates. They depend on the seed only, so two runs of a
profile have the same arrivals. Times are in seconds; time 0 is the end of the warm-up.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from deepseek_triton.loadtest.profile import LoadProfile, Stage


def all_stages(profile: LoadProfile) -> list[tuple[float, Stage]]:
    """Return each stage with its start time in seconds; the warm-up is the first."""
    first = profile.stages[0].start
    stages = [Stage(profile.warmup_s, first, first)] if profile.warmup_s else []
    starts, at = [], -profile.warmup_s
    for stage in (*stages, *profile.stages):
        starts.append((at, stage))
        at += stage.seconds
    return starts


def poisson(profile: LoadProfile) -> list[float]:
    """Return the arrival time of each request in ascending order."""
    return list(_at_integrals(all_stages(profile), _unit_poisson(random.Random(f"arrivals {profile.seed}"))))


def level_at(profile: LoadProfile, time_s: float) -> float:
    """Return the level at a time, in requests/s (open) or users (closed); 0 outside the stages."""
    for start, stage in all_stages(profile):
        if start <= time_s < start + stage.seconds:
            return stage.start + (stage.end - stage.start) * (time_s - start) / stage.seconds
    return 0.0


def _unit_poisson(source: random.Random) -> Iterator[float]:
    at = 0.0
    while True:
        at -= math.log(1.0 - source.random())
        yield at


def _at_integrals(stages: Sequence[tuple[float, Stage]], integrals: Iterator[float]) -> Iterator[float]:
    """Yield the times at which the integral of the rate reaches each of the ascending `integrals`."""
    wanted, before = next(integrals), 0.0
    for start, stage in stages:
        area = stage.seconds * (stage.start + stage.end) / 2
        while wanted < before + area:
            yield start + _reach(stage, wanted - before)
            wanted = next(integrals)
        before += area


def _reach(stage: Stage, area: float) -> float:
    """Return after how many seconds of the stage the integral of its rate is `area`.

    It is the root of `start * t + slope * t² / 2 = area`, in the form that is stable for a slope near 0.
    """
    slope = (stage.end - stage.start) / stage.seconds
    return 2 * area / (stage.start + math.sqrt(max(stage.start**2 + 2 * slope * area, 0.0)))
