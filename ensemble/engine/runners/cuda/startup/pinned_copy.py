"""Copies from mapped files to a GPU: threads fill page-locked blocks, from which the GPU's copy engine reads."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_BYTES = 2**24
NUM_BLOCKS = 8


class PinnedCopy:
    """Copies bytes to `device`, by as many threads as it has blocks."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._blocks: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(NUM_BLOCKS):
            self._blocks.put(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True))
        self._pool = ThreadPoolExecutor(NUM_BLOCKS, thread_name_prefix="pinned-copy")

    def __call__(self, source: NDArray[np.uint8], target: torch.Tensor) -> None:
        """source [n] → target [n], bytes; returns when they are there."""
        self._stream.wait_stream(torch.cuda.current_stream(target.device))  # the target's memory may be in use there

        def copy(start: int) -> None:
            part = source[start : start + BLOCK_BYTES]
            block = self._blocks.get()
            try:
                np.copyto(block.numpy()[: len(part)], part)
                with torch.cuda.stream(self._stream):
                    target[start : start + len(part)].copy_(block[: len(part)], non_blocking=True)
                    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    event.record()
                event.synchronize()
            finally:
                self._blocks.put(block)

        for _ in self._pool.map(copy, range(0, len(source), BLOCK_BYTES)):
            pass


@cache
def pinned_copy(device: torch.device) -> PinnedCopy:
    """The one of a device; it keeps its blocks."""
    return PinnedCopy(device)
