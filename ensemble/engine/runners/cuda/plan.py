"""Which kernel multiplies how many rows, in tiles of what size: settled before the first step, the same ever after.

Measured on an H100 (benchmarks/decode_gpu_notes.md). Nothing here changes what is computed, except the order in which
sums are taken; the `invariant` plan takes them in one order for every batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

MAX_SMALL_M_ROWS = 64  # above, the library's GEMM
OTHER_SHARED_BYTES = 8192  # what a kernel needs besides, for its sums


@dataclass(frozen=True)
class Gemv:
    """One row: tiles of `bn` weight rows, `bk` columns at a time where a row isn't read whole.

    programs: for each multiprocessor, that go through tiles with `stages` of them on their way; 0: one program a tile.
    """

    bn: int
    num_warps: int
    bk: int = 0
    programs: int = 0
    stages: int = 0

    def fitting(self, row_bytes: int, shared_bytes: int) -> Gemv:
        """With fewer rows a tile, then fewer tiles on their way, if they wouldn't fit into a block's shared memory.

        row_bytes: of all matrices that are read side by side, as far as a tile reads them.
        """
        tile = self
        while tile.stages > 1 and (tile.stages - 1) * tile.bn * row_bytes + OTHER_SHARED_BYTES > shared_bytes:
            tile = replace(tile, bn=tile.bn // 2) if tile.bn > 1 else replace(tile, stages=tile.stages - 1)
        return tile


@dataclass(frozen=True)
class SmallMTile:
    """A few rows: tiles of `bn` weight rows and `row_bytes` of each, the inner dimension split into `num_parts`."""

    num_parts: int
    bn: int = 64
    row_bytes: int = 256
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True)
class KernelPlan:
    """gemv: by fused matrix, for batch 1; gemv empty: batch 1 goes the way of others. small_m: by fused matrix.

    max_small_m_rows: above it the library's GEMM is used; None: never. splits: programs that share a slot's cache;
    None: by batch.
    """

    gemv: dict[str, Gemv] = field(default_factory=dict)
    small_m: dict[str, SmallMTile] = field(default_factory=dict)
    max_small_m_rows: int | None = MAX_SMALL_M_ROWS
    splits: int | None = None

    def use_library(self, rows: int) -> bool:
        """Whether `rows` are more than the small_m kernel is for."""
        return self.max_small_m_rows is not None and rows > self.max_small_m_rows

    def num_splits(self, rows: int, num_kv_heads: int, num_processors: int) -> int:
        """Programs for each slot and key head, a power of two: together some two for each multiprocessor."""
        if self.splits is not None:
            return self.splits
        wanted = max(1, 2 * num_processors // (rows * num_kv_heads))
        return min(1 << (wanted.bit_length() - 1), MAX_SPLITS)


MAX_SPLITS = 32
SMALL_M = {
    "qkv": SmallMTile(num_parts=4),
    "o": SmallMTile(num_parts=4),
    "gate_up": SmallMTile(num_parts=1),
    "down": SmallMTile(num_parts=7),
    "head": SmallMTile(num_parts=1, row_bytes=128),
}
FAST = KernelPlan(
    gemv={
        "qkv": Gemv(bn=4, num_warps=4),
        "o": Gemv(bn=4, num_warps=4, bk=4096),
        "gate_up": Gemv(bn=8, num_warps=16, programs=1, stages=3),
        "down": Gemv(bn=8, num_warps=4, bk=1024),
        "head": Gemv(bn=4, num_warps=8),
    },
    small_m=SMALL_M,
)
INVARIANT = KernelPlan(small_m=SMALL_M, max_small_m_rows=None, splits=8)
