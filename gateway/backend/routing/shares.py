"""RouteFile: names that clients call → the models that answer them, each with its share. A file that may change.

{"routes": {"r1": {"by": "caller", "arms": [{"model": "r1", "weight": 99}, {"model": "r1-next", "weight": 1}]}}}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from deepseek_triton.gateway.backend.watched_file import WatchedFile

By = Literal["caller", "request"]


@dataclass(frozen=True)
class Arm:
    """One model of a route. weight: its share is this part of all the route's weights; 0: no new request gets it."""

    model: str
    weight: float


@dataclass(frozen=True)
class Route:
    """The arms of one name. by: what is dealt: "caller" keeps each key, or address, on one arm; "request" doesn't.

    As the weight of the last arm grows, callers move to it and none moves back. Raises `ValueError`.
    """

    arms: tuple[Arm, ...]
    by: By = "caller"

    def __post_init__(self) -> None:
        """Check it."""
        if self.by not in get_args(By):
            raise ValueError(f"by must be one of {', '.join(get_args(By))}, got {self.by!r}")
        for arm in self.arms:
            if not isinstance(arm.model, str) or not arm.model:
                raise ValueError(f"model must be a model's name, got {arm.model!r}")
            if isinstance(arm.weight, bool) or not isinstance(arm.weight, int | float):
                raise ValueError(f"weight must be a number, got {arm.weight!r}")
            if not (math.isfinite(arm.weight) and arm.weight >= 0):
                raise ValueError(f"weight must be finite and at least 0, got {arm.weight!r}")
        if len({arm.model for arm in self.arms}) < len(self.arms):
            raise ValueError("each model must be in a route once")
        if not sum(arm.weight for arm in self.arms) > 0:
            raise ValueError("a route must have an arm whose weight is above 0")

    def pick(self, name: str, caller: str, lot: float) -> str:
        """The model that answers `caller`, who asks for `name`; lot: in [0, 1), the request's own."""
        point = (_point(f"{name}\0{caller}") if self.by == "caller" else lot) * sum(arm.weight for arm in self.arms)
        reached = 0.0
        for arm in self.arms:
            reached += arm.weight
            if point < reached:
                return arm.model
        return [arm.model for arm in self.arms if arm.weight][-1]  # rounding


Routes = Mapping[str, Route]


class RouteFile(WatchedFile[Routes]):
    """The routes in the file at `path`; "": none."""

    def __init__(self, path: str) -> None:
        super().__init__(path, read_routes, {})


def read_routes(text: str) -> Routes:
    """The routes that a file's JSON tells. Raises `ValueError`, naming the route."""
    form = json.loads(text)
    if not isinstance(form, dict) or set(form) != {"routes"} or not isinstance(form["routes"], dict):
        raise ValueError('routes must be an object {"routes": {NAME: {"arms": […]}}}')
    return {name: _read_route(name, route) for name, route in form["routes"].items()}


def write_routes(path: Path, routes: Routes) -> None:
    """Replace the file at `path` as a whole: a gateway meets the old routes or the new ones."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(_form(routes), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp's files are their user's alone; the gateway may be another's
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def _read_route(name: str, form: Any) -> Route:
    try:
        if not isinstance(form, dict) or not isinstance(form.get("arms"), list) or set(form) - {"arms", "by"}:
            raise ValueError('it must be {"arms": […]}, and may have "by"')
        return Route(tuple(map(_read_arm, form["arms"])), form.get("by", "caller"))
    except ValueError as error:
        raise ValueError(f"the route {name!r}: {error}") from None


def _read_arm(form: Any) -> Arm:
    if not isinstance(form, dict) or set(form) != {"model", "weight"}:
        raise ValueError(f'an arm must be {{"model": NAME, "weight": NUMBER}}, got {form!r}')
    return Arm(form["model"], form["weight"])


def _form(routes: Routes) -> dict[str, Any]:
    return {
        "routes": {
            name: {"by": route.by, "arms": [{"model": arm.model, "weight": arm.weight} for arm in route.arms]}
            for name, route in routes.items()
        }
    }


def _point(text: str) -> float:
    """A number in [0, 1) that is always the same for a text, in every gateway."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=6).digest(), "big") / 2**48
