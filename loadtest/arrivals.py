"""When requests are due and how many users there are: stages in, seconds out.

Open arrivals are a Poisson process whose rate follows the stages: the arrivals of a process with rate 1 are put where
the integral of the rate reaches them. That is exact for rates that change evenly, and the seed alone decides it, so
two runs of one profile meet the same arrivals. Time 0 is the warm-up's end.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from deepseek_triton.loadtest.profile import LoadProfile, Stage


def all_stages(profile: LoadProfile) -> list[tuple[float, Stage]]:
    """Each stage with its start, the warm-up first."""
    first = profile.stages[0].start
    stages = [Stage(profile.warmup_s, first, first)] if profile.warmup_s else []
    starts, at = [], -profile.warmup_s
    for stage in (*stages, *profile.stages):
        starts.append((at, stage))
        at += stage.seconds
    return starts


def poisson(profile: LoadProfile) -> list[float]:
    """When each request is due, in order."""
    return list(_at_integrals(all_stages(profile), _unit_poisson(random.Random(f"arrivals {profile.seed}"))))


def level_at(profile: LoadProfile, time_s: float) -> float:
    """Requests/s or users at a time; 0 outside the stages."""
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
    """Where the integral of the stages' rate reaches each of `integrals`, which grow, until the last stage's end."""
    wanted, before = next(integrals), 0.0
    for start, stage in stages:
        area = stage.seconds * (stage.start + stage.end) / 2
        while wanted < before + area:
            yield start + _reach(stage, wanted - before)
            wanted = next(integrals)
        before += area


def _reach(stage: Stage, area: float) -> float:
    """Seconds into the stage after which its rate has summed up to `area`.

    The root of `start * t + slope * t² / 2 = area`, in the form that stays exact for a slope near 0.
    """
    slope = (stage.end - stage.start) / stage.seconds
    return 2 * area / (stage.start + math.sqrt(max(stage.start**2 + 2 * slope * area, 0.0)))
