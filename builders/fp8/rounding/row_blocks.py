"""Row blocks of a matrix on all cores; NumPy's loops release the GIL.

It knows no number format; `host.py` has the arithmetic of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from deepseek_triton.ensemble.processes.machine import num_cores

# Elements of a block: a NumPy call on it takes long beside handing the GIL over, which costs up to 0.1 ms in a sandbox.
BLOCK_ELEMENTS = 2**20


def for_row_blocks(shape: tuple[int, ...], work: Callable[[slice], None]) -> None:
    """Call `work` with slices that cover the rows of a matrix of `shape`; several calls run at once."""
    num_rows, row_len = shape
    height = max(1, BLOCK_ELEMENTS // max(1, row_len))
    blocks = [slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height)]
    if len(blocks) < 2:
        for block in blocks:
            work(block)
        return
    for _ in _pool().map(work, blocks):
        pass


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_cores(), thread_name_prefix="row-blocks")
