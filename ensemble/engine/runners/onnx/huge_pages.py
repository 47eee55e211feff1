"""A graph's weights in pages of 2 MB.

A step of one sequence reads all weights once. In pages of 4 KB the processor looks up half a million addresses for
2 GB of them, and reads at half the rate (benchmarks/cpu_notes.md). Kernels put memory in huge pages by themselves only
where that is set for the whole machine, so a runner asks for them (Linux 6.1 and later; elsewhere nothing happens).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PAGE, HUGE_PAGE = 4096, 2 * 2**20
MADV_COLLAPSE = 25
MIN_RESIDENT = 0.9  # of a huge page's small pages: the others would take memory that isn't in use

Regions = list[tuple[int, int]]


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Move memory that is allocated meanwhile, and is in use at the end, to huge pages."""
    if not _are_allowed():
        yield
        return
    before = _private_memory()
    yield
    for start, end in _without(_private_memory(), before):
        _collapse(start, end)


def _are_allowed() -> bool:
    """Whether the machine's owner allows a process to ask for them."""
    if sys.platform != "linux":
        return False
    try:
        return "[never]" not in SETTING.read_text("ascii")
    except OSError:
        return False


def _private_memory() -> Regions:
    """Start and end of this process's own writable memory, in order."""
    regions = []
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        addresses, mode, _, _, inode, *name = line.split(maxsplit=5)
        if mode == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in addresses.split("-"))
            regions.append((start, end))
    return regions


def _without(regions: Regions, others: Regions) -> Regions:
    """The parts of `regions` that are in none of the `others`; both in order."""
    left = []
    for start, end in regions:
        for other_start, other_end in others:
            if other_end <= start or other_start >= end:
                continue
            if other_start > start:
                left.append((start, other_start))
            start = max(start, other_end)
        if start < end:
            left.append((start, end))
    return left


def _collapse(start: int, end: int) -> None:
    """Copy what nearly fills a huge page to one; what the kernel refuses stays as it is."""
    first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    if first >= last:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    resident = np.zeros((last - first) // PAGE, np.uint8)
    if libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(last - first), resident.ctypes.data_as(ctypes.c_void_p)):
        return
    shares = (resident & 1).reshape(-1, HUGE_PAGE // PAGE).mean(1)
    for index in np.flatnonzero(shares >= MIN_RESIDENT).tolist():
        libc.madvise(ctypes.c_void_p(first + index * HUGE_PAGE), ctypes.c_size_t(HUGE_PAGE), MADV_COLLAPSE)
