"""Kernel launches on one device: common options, scratch memory, and the placeholder for an absent tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deepseek_triton.ensemble.engine.runners.cuda.startup.compile_ahead import Launch


def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a block may have at most on a CUDA device."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


class Launcher:
    """Launches kernels on `device`.

    Args:
        dtype: of what isn't FP8: bfloat16; float32 for checks.
        pdl: let kernels start while their predecessors end (Hopper and later).
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, pdl: bool) -> None:
        self.device, self.dtype = device, dtype
        self.precision = "ieee" if dtype == torch.float32 else "tf32"
        self.processors, self.shared_bytes = 4, 2**16  # for Triton's interpreter
        if device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count
            self.shared_bytes = shared_bytes(device)
        # Hopper's own kernels are for what isn't a check.
        self.is_hopper = (
            device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] == 9
        )
        self.prefetches = pdl  # only before a wait is there time for it
        self._options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
        self._pdl = pdl
        self._recorded: dict[tuple[Any, ...], Launch] | None = None
        self._nothing = torch.zeros(1, dtype=torch.float32, device=device)

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch `kernel` with the options that all kernels have."""
        if self._recorded is not None:
            launched = Launch.of(kernel, grid, arguments, {"PDL": self._pdl, **constants, **self._options})
            if launched is not None:  # one of each kind: a launch keeps the tensors of its descriptors
                self._recorded.setdefault(launched.key, launched)
            return
        launch: Callable[..., None] = kernel[grid]
        launch(*arguments, PDL=self._pdl, **constants, **self._options)

    @contextmanager
    def recording(self) -> Iterator[list[Launch]]:
        """Collect what would be launched, in the end one launch of each kind; nothing is launched."""
        launches: list[Launch] = []
        self._recorded = {}
        try:
            yield launches
        finally:
            launches += self._recorded.values()
            self._recorded = None

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Uninitialised memory for a kernel's result."""
        return torch.empty(size, dtype=dtype, device=self.device)

    def or_nothing(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """`tensor`, or a placeholder that the kernel doesn't read."""
        return self._nothing if tensor is None else tensor
