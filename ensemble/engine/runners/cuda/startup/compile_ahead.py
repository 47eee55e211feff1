"""Kernels compiled by several threads before the first of them runs.

In a first run `Launcher` only records what it would launch; Triton then compiles these kernels side by side. What it
can't compile ahead is compiled at its first launch, as ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton

log = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes; Triton compiles other code for pointers that aren't multiples of it
MAX_THREADS = 16


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded. arguments: numbers, descriptors, and for a tensor its dtype."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]

    @classmethod
    def of(
        cls, kernel: Any, grid: tuple[int, ...], arguments: Iterable[Any], constants: dict[str, Any]
    ) -> Launch | None:
        """None: a tensor isn't aligned."""
        told = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                if argument.data_ptr() % ALIGNMENT:
                    return None
                argument = argument.dtype
            told.append(argument)
        return cls(kernel, grid, tuple(told), tuple(sorted(constants.items())))

    @property
    def key(self) -> tuple[Any, ...]:
        """What Triton compiles different code for."""
        return id(self.kernel), tuple(map(_kind, self.arguments)), self.constants


def _kind(value: Any) -> tuple[Any, ...]:
    if isinstance(value, int):
        return type(value), value == 1, value % ALIGNMENT == 0
    if hasattr(value, "block_shape"):  # a descriptor, Triton's or Gluon's
        return type(value), value.base.dtype, *value.block_shape
    return type(value), str(value)


def compile_ahead(launches: Iterable[Launch]) -> int:
    """Compile the kernels of `launches`; how many there were. 0: this Triton can't."""
    if not hasattr(triton, "AsyncCompileMode"):
        return 0
    unique = {launch.key: launch for launch in launches}
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    # An error is left to the launch itself, which then compiles again.
    try:
        with pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for launch in unique.values():
                launch.kernel.warmup(*launch.arguments, grid=launch.grid, **dict(launch.constants))
    except Exception as error:
        log.warning("kernels can't be compiled ahead: %s", error)
    return len(unique)
