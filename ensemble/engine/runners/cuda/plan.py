"""The kernel and tile size for each matrix and number of rows, fixed when the model is loaded.

The figures were measured on an H100, those of experts on an H200 (benchmarks/decode_gpu_notes.md). A plan changes only
the order of sums; the INVARIANT plan has one order for every batch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

MAX_SMALL_M_ROWS = 64  # more rows use cuBLAS
OTHER_SHARED_BYTES = 8192  # shared memory of a kernel besides its tiles, for reductions


@dataclass(frozen=True)
class Gemv:
    """Tiles of a GEMV kernel: `bn` weight rows, `bk` columns at a time where a row isn't read whole.

    programs: persistent programs a multiprocessor, each prefetching `stages` tiles; 0: one program a tile.
    """

    bn: int
    num_warps: int
    bk: int = 0
    programs: int = 0
    stages: int = 0

    def fitting(self, row_bytes: int, shared_bytes: int) -> Gemv:
        """A plan that fits into a block's shared memory: first with fewer rows a tile, then with fewer stages.

        row_bytes: bytes of a tile's row, summed over the matrices that the kernel reads at once.
        """
        tile = self
        while tile.stages > 1 and (tile.stages - 1) * tile.bn * row_bytes + OTHER_SHARED_BYTES > shared_bytes:
            tile = replace(tile, bn=tile.bn // 2) if tile.bn > 1 else replace(tile, stages=tile.stages - 1)
        return tile


@dataclass(frozen=True)
class SmallMTile:
    """Tiles of the small_m_gemm kernel: `bn` weight rows, `row_bytes` of each; num_parts: split-K."""

    num_parts: int
    bn: int = 64
    row_bytes: int = 256
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True)
class ExpertTile:
    """Tiles of the grouped_gemm kernel: `bn` rows of gate and of up, `down_bn` of down, `row_bytes` of each at a time.

    fast_sums: sum E4M3 products in the tensor cores' own precision throughout, as cuBLAS does for many rows.
    most_tokens: of an expert on average; for more, the plan's next tile is faster.
    """

    bn: int
    down_bn: int
    row_bytes: int
    num_warps: int
    num_stages: int
    fast_sums: bool = False
    most_tokens: float = math.inf

    def fitting(self, tokens: int, shared_bytes: int) -> ExpertTile:
        """The same with as many stages as a block's shared memory holds, where a tile has so many tokens.

        One stage has no buffer of its own; on Hopper it may have one, and the plan's own stages fit there all the same.
        """
        rows = tokens + max(2 * self.bn, self.down_bn)
        stages = 1 + max(1, (shared_bytes - OTHER_SHARED_BYTES) // (rows * self.row_bytes))
        return replace(self, num_stages=min(self.num_stages, stages))


@dataclass(frozen=True)
class KernelPlan:
    """gemv: tiles of each fused matrix for batch 1; empty: batch 1 uses small_m_gemm too. small_m: tiles, likewise.

    max_small_m_rows: more rows use cuBLAS; None: no number does. splits: of each row's cached positions, for each key
    head; None: by the lengths, those of latent attention by batch size. experts: tiles by the number of tokens of one.
    """

    gemv: dict[str, Gemv] = field(default_factory=dict)
    small_m: dict[str, SmallMTile] = field(default_factory=dict)
    max_small_m_rows: int | None = MAX_SMALL_M_ROWS
    splits: int | None = None
    experts: dict[int, ExpertTile] = field(default_factory=lambda: EXPERTS)

    def expert_rows(self, tokens: float) -> int:
        """Tokens of an expert's tile, where an expert gets so many on average."""
        fitting = (rows for rows in sorted(self.experts) if tokens <= self.experts[rows].most_tokens)
        return next(fitting, max(self.experts))

    def use_library(self, rows: int) -> bool:
        """Whether `rows` are multiplied by cuBLAS."""
        return self.max_small_m_rows is not None and rows > self.max_small_m_rows

    def num_splits(self, rows: int, num_kv_heads: int, num_processors: int) -> int:
        """Programs a slot and key head, a power of two: in total about two a multiprocessor."""
        if self.splits is not None:
            return self.splits
        wanted = max(1, 2 * num_processors // (rows * num_kv_heads))
        return min(1 << (wanted.bit_length() - 1), MAX_SPLITS)

    def extra_items(self, rows: int, num_kv_heads: int, num_processors: int) -> int:
        """Splits of a step's attention besides one a row, for each key head: all programs about two a multiprocessor.

        Few rows have at most MAX_SPLITS each on average.
        """
        return max(1, min(2 * num_processors // num_kv_heads, rows * (MAX_SPLITS - 1)))


MAX_SPLITS = 32
# Measured on an H200, V2-Lite's 64 experts and 2 shared ones.
EXPERTS: dict[int, ExpertTile] = {
    16: ExpertTile(bn=64, down_bn=64, row_bytes=128, num_warps=4, num_stages=5, most_tokens=8),
    32: ExpertTile(bn=128, down_bn=128, row_bytes=128, num_warps=8, num_stages=3, most_tokens=32),
    64: ExpertTile(bn=128, down_bn=128, row_bytes=128, num_warps=8, num_stages=4, most_tokens=64),
    128: ExpertTile(bn=128, down_bn=256, row_bytes=128, num_warps=8, num_stages=4, fast_sums=True),
}
INVARIANT_EXPERTS = {rows: tile for rows, tile in EXPERTS.items() if rows <= MAX_SMALL_M_ROWS}  # one order of sums
SMALL_M = {
    "qkv": SmallMTile(num_parts=4),
    "q_kv_a": SmallMTile(num_parts=4),
    "q_b": SmallMTile(num_parts=2),
    "o": SmallMTile(num_parts=4),
    "gate_up": SmallMTile(num_parts=1),
    "down": SmallMTile(num_parts=7),
    "head": SmallMTile(num_parts=1, row_bytes=128),
    "shared_gate_up": SmallMTile(num_parts=1),
    "shared_down": SmallMTile(num_parts=4),
}
FAST = KernelPlan(
    gemv={
        "qkv": Gemv(bn=4, num_warps=4),
        "q_kv_a": Gemv(bn=4, num_warps=4),
        "q_b": Gemv(bn=4, num_warps=4),
        "router": Gemv(bn=1, num_warps=4),
        "experts_gate_up": Gemv(bn=2, num_warps=4),
        "experts_down": Gemv(bn=8, num_warps=4, stages=5),
        "o": Gemv(bn=4, num_warps=4, bk=4096),
        "gate_up": Gemv(bn=8, num_warps=16, programs=1, stages=3),
        "down": Gemv(bn=8, num_warps=4, bk=1024),
        "head": Gemv(bn=4, num_warps=8),
    },
    small_m=SMALL_M,
)
INVARIANT = KernelPlan(small_m=SMALL_M, max_small_m_rows=None, splits=8, experts=INVARIANT_EXPERTS)
