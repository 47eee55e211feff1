"""Selects the service levels of a run: from a recorded run on the same machine, or from the profile.

A profile's levels were derived from runs on the machine that its basis names. On another machine latency and backlog
aren't judged, except against a run recorded on that machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_triton.loadtest.basis import MARGIN
from deepseek_triton.loadtest.levels import LEVELS
from deepseek_triton.loadtest.profile import Basis, Levels, LoadProfile, LoadProfileError
from deepseek_triton.loadtest.result import LoadTestResult

# These levels are always judged against a recorded run, besides those that the profile has.
SPEED = ("p99_latency_s", "p99_first_token_s", "p99_inter_token_s")
HARDWARE = ("processor", "cores", "memory_gib")


def judged_against(
    chosen: LoadProfile, recorded: LoadTestResult, model: str, machine: Mapping[str, Any]
) -> LoadProfile:
    """Return `chosen` with levels that are MARGIN times the values of `recorded`.

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
    """Return `chosen` without its latency and backlog levels if they were derived on another machine."""
    if chosen.basis is None or chosen.basis.machine == machine_name(machine):
        return chosen
    levels = Levels(**{name: getattr(chosen.levels, name) for name in Basis.WITHOUT_MARGIN})
    return dataclasses.replace(chosen, levels=levels, basis=None)


def machine_name(machine: Mapping[str, Any]) -> str:
    """Return the name of a machine as used in a Basis."""
    return f"{machine['processor']}, {machine['cores']} cores"
