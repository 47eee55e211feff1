"""How a block of a persistent kernel lays out its shared memory: see kernels/persistent/common.cu."""

from __future__ import annotations

from dataclasses import dataclass

# As in the source.
WARPS, PRODUCER_WARPS, MAX_PAIRS = 8, 4, 160
STAGE_BYTES = 16384  # of a stage, at most, where whole rows fit
ALIGNMENT = 128
GRID_BYTES = 5120  # of the source's `Grid`, with what aligns it
MAX_PADDING = 512  # of a row of bfloat16 activations whose parts are an odd number of tiles
MIN_STAGES = 4
# Stages that are not being copied, at least. Two warpgroups take stages in turn, so one may wait for a stage in whose
# place the other's was before. That one must have been copied: a barrier tells laps apart only by being odd or even.
SPARE_STAGES = 3


@dataclass(frozen=True)
class Memory:
    """Sizes in bytes. in_flight: stages that are copied at a time, at most; board: what a kernel has beside them."""

    stages: int
    in_flight: int
    stage_bytes: int
    scratch_bytes: int
    board_bytes: int
    total: int

    @classmethod
    def of(cls, stage: int, scratch: int, *, limit: int, in_flight: int, board: int = 0) -> Memory:
        """The layout with as many stages as fit into `limit` bytes, of which `in_flight` bytes are copied at a time."""
        scratch = aligned(scratch)
        fixed = scratch + WARPS * 2 * MAX_PAIRS * 4 + 2 * WARPS * 4 + board
        stages = (limit - fixed) // (stage + 16)
        copied = max(1, min(round(in_flight / stage), stages - SPARE_STAGES))
        return cls(stages, copied, stage, scratch, board, fixed + stages * (stage + 16))

    @property
    def macros(self) -> dict[str, object]:
        """What the source knows of it."""
        return {
            "STAGES": self.stages, "IN_FLIGHT": self.in_flight, "STAGE_BYTES": self.stage_bytes,
            "SCRATCH_BYTES": self.scratch_bytes, "BOARD_BYTES": self.board_bytes,
        }  # fmt: skip


def stage_bytes(row: int) -> int:
    """Of a stage that holds 8, 4 or 2 rows of so many bytes."""
    rows = next((rows for rows in (8, 4, 2) if rows * row <= STAGE_BYTES), 0)
    return aligned(rows * row) if rows * row > STAGE_BYTES // 2 else STAGE_BYTES


def operand_bytes(width: int, *, is_fp8: bool) -> int:
    """Of a row of activations as the products read it, at most."""
    return width * 2 if is_fp8 else width * 4 + MAX_PADDING


def aligned(size: int) -> int:
    """`size`, or a little more, as addresses of stages must be."""
    return -(-size // ALIGNMENT) * ALIGNMENT
