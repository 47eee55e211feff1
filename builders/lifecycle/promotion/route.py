"""The route of one name in the gateway's route file: what answers it, and by which shares (docs/gateway.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically


def arms_of(path: Path, name: str) -> dict[str, float]:
    """Model → weight, of the name's route; empty if it has none, or there is no file.

    Raises:
        BuildError: the file can't be read.
    """
    route = _read(path)["routes"].get(name)
    try:
        return {} if route is None else {str(arm["model"]): float(arm["weight"]) for arm in route["arms"]}
    except (KeyError, TypeError, ValueError) as error:
        raise BuildError(f"{path}: the route {name!r} can't be read; correct it") from error


def answering(repository: Path, name: str, routes: Path | None) -> str:
    """The one model that answers `name`: by its route, without one the model of that name.

    Raises:
        BuildError: several share it, or the model isn't there.
    """
    found = arms_of(routes, name) if routes is not None else {}
    arms = [model for model, weight in found.items() if weight]
    if len(arms) > 1:
        raise BuildError(f"{routes}: {name} has shares already: {', '.join(arms)}; leave it one")
    model = next(iter(arms), name)
    if not (repository / model).is_dir():
        raise BuildError(f"{repository} has no model {model!r}, which answers {name}")
    return model


def next_name(repository: Path, name: str) -> str:
    """NAME-v2, NAME-v3 and so on: one more than the highest that is there."""
    pattern = re.compile(rf"{re.escape(name)}-v(\d+)")
    numbers = [int(found[1]) for path in repository.iterdir() if (found := pattern.fullmatch(path.name))]
    return f"{name}-v{max(numbers, default=1) + 1}"


def write_route(path: Path, name: str, arms: dict[str, float], by: str) -> None:
    """Replace the name's route; other routes stay. The gateway meets the old file or the new one.

    Raises:
        BuildError: the file can't be read or written.
    """
    values = _read(path)
    values["routes"][name] = {"by": by, "arms": [{"model": model, "weight": weight} for model, weight in arms.items()]}
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode(), BuildError)


def routed_models(path: Path, models: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Those of `models` that are to be loaded: all but the versions of a name which its route gives no request.

    models: name → its parts. A name's versions are itself and NAME-v2, NAME-v3 and so on; without a route it is itself.

    Raises:
        BuildError: the file can't be read.
    """
    left_out: set[str] = set()
    for name in models:
        arms = arms_of(path, name)
        versions = {one for one in models if re.fullmatch(rf"{re.escape(name)}-v\d+", one)}
        if arms or versions:
            left_out |= {name, *versions} - ({model for model, weight in arms.items() if weight} or {name})
    return {name: parts for name, parts in models.items() if name not in left_out}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"routes": {}}
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}; name the gateway's route file") from error
    except ValueError as error:
        raise BuildError(f"{path} is not valid JSON; correct it") from error
    if not isinstance(values, dict) or not isinstance(values.get("routes"), dict):
        raise BuildError(f'{path} has no "routes"; name the gateway\'s route file')
    return values
