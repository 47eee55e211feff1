"""The targets that a model can be built for, found by name.

A target is a module of this package with an object `TARGET`; the module has the target's name, with "_" for "-". Its
other half, which loads what it wrote, is the module of the same name in `ensemble/engine/runners`. Nothing else names
a target. What several targets share lies in the subpackage `artefacts`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from deepseek_triton.builders.errors import BuildError

if TYPE_CHECKING:
    from deepseek_triton.builders.targets.artefacts.target import Target

DEFAULT_TARGET = "onnx"


def target_names() -> tuple[str, ...]:
    """The names of all targets: the default one, then the others by alphabet."""
    modules = (module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return tuple(sorted(modules, key=lambda name: (name != DEFAULT_TARGET, name)))


def target_named(name: str) -> Target:
    """The target's object.

    Raises:
        BuildError: there is no such target.
    """
    if name not in target_names():
        raise BuildError(f"target is {name!r}; supported: {', '.join(target_names())}")
    return _load(name)


def all_targets() -> tuple[Target, ...]:
    """Every target's object, in the order of `target_names`."""
    return tuple(map(_load, target_names()))


@cache
def _load(name: str) -> Target:
    target: Target = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").TARGET
    return target
