"""Which speed a run owes: that of a recorded run of the same machine, or what its profile promises for this machine.

A profile's levels follow from runs on the machine that its basis names. On another machine they say nothing, so speed
isn't judged there, unless by a run recorded on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_triton.loadtest.basis import MARGIN
from deepseek_triton.loadtest.levels import LEVELS
from deepseek_triton.loadtest.profile import Basis, Levels, LoadProfile, LoadProfileError
from deepseek_triton.loadtest.result import LoadTestResult

# Judged of every profile; what else its own levels name is judged too.
SPEED = ("p99_latency_s", "p99_first_token_s", "p99_inter_token_s")
HARDWARE = ("processor", "cores", "memory_gib")


def judged_against(
    chosen: LoadProfile, recorded: LoadTestResult, model: str, machine: Mapping[str, Any]
) -> LoadProfile:
    """`chosen` with levels that are MARGIN times the figures of `recorded`.

    Raises:
        LoadProfileError: the recorded run is invalid, or of another load, model or machine.
    """
    if not recorded.is_valid:
        raise LoadProfileError(f"the run of {recorded.started} is invalid: speed can't be judged against it")
    if recorded.profile.load != chosen.load:
        raise LoadProfileError(f"the run of {recorded.started} had another profile or scale: its figures don't compare")
    if recorded.target.model != model:
        raise LoadProfileError(
            f"the run of {recorded.started} was of model {recorded.target.model!r}, this is {model!r}"
        )
    for name in HARDWARE:
        if recorded.machine.get(name) != machine.get(name):
            raise LoadProfileError(
                f"the run of {recorded.started} was on another machine: {name} was {recorded.machine.get(name)}, "
                f"here it is {machine.get(name)}"
            )
    runs = {}
    for name in LEVELS:
        is_owed = name in SPEED or getattr(chosen.levels, name) is not None
        if is_owed and name not in Basis.WITHOUT_MARGIN:
            figure = LEVELS[name][2](recorded.summary)
            if figure is not None:
                runs[name] = (figure,)
    basis = Basis(MARGIN, machine_name(machine), runs)
    limits: dict[str, Any] = {name: basis.limit(name) for name in runs}
    return dataclasses.replace(chosen, levels=Levels(max_error_ratio=0, **limits), basis=basis)


def without_foreign_levels(chosen: LoadProfile, machine: Mapping[str, Any]) -> LoadProfile:
    """`chosen` without the levels of speed if they follow from runs of another machine."""
    if chosen.basis is None or chosen.basis.machine == machine_name(machine):
        return chosen
    levels = Levels(**{name: getattr(chosen.levels, name) for name in Basis.WITHOUT_MARGIN})
    return dataclasses.replace(chosen, levels=levels, basis=None)


def machine_name(machine: Mapping[str, Any]) -> str:
    """A machine as a basis names it."""
    return f"{machine['processor']}, {machine['cores']} cores"
