"""Modules that are imported when a test first uses them: each worker collects all tests, and runs some of them."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """A module that is imported when it is first asked for a public name.

    What pytest asks of everything in a test's module while it collects, `__test__` and the like, imports nothing.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


def lazy(name: str) -> ModuleType:
    """The module, whose code runs when it is first asked for something."""
    return LazyModule(name)
