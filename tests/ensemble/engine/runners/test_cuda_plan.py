"""What batch 1's tiles need of a multiprocessor's shared memory."""

from __future__ import annotations

import pytest

from deepseek_triton.ensemble.engine.runners.cuda.plan import EXPERTS, FAST, INVARIANT, OTHER_SHARED_BYTES, Gemv

H100, ADA = 232448, 101376  # bytes that a block may have


@pytest.mark.parametrize(
    ("columns", "itemsize", "shared_bytes", "rows", "stages"),
    [
        (4096, 1, H100, 8, 3),  # as measured to be best
        (4096, 2, H100, 4, 3),  # with 8 rows 262,656 bytes, more than there are
        (8192, 1, H100, 4, 3),
        (8192, 2, H100, 2, 3),
        (4096, 1, ADA, 4, 3),
        (16384, 2, ADA, 1, 2),
    ],
)
def test_fewer_rows_travel_where_they_would_not_fit(
    columns: int, itemsize: int, shared_bytes: int, rows: int, stages: int
) -> None:
    tile = FAST.gemv["gate_up"]
    row_bytes = 2 * columns * itemsize
    fitting = tile.fitting(row_bytes, shared_bytes)
    assert (fitting.bn, fitting.stages) == (rows, stages)
    assert (stages - 1) * rows * row_bytes < shared_bytes
    assert (fitting.num_warps, fitting.programs) == (tile.num_warps, tile.programs)


def test_what_is_not_in_flight_needs_no_room() -> None:
    tile = Gemv(bn=4, num_warps=4)
    assert tile.fitting(2**20, ADA) is tile


@pytest.mark.parametrize("tokens", EXPERTS)
def test_an_experts_tiles_fit_a_smaller_gpu(tokens: int) -> None:
    tile = EXPERTS[tokens]
    assert tile.fitting(tokens, H100) == tile
    fitting = tile.fitting(tokens, ADA)
    rows = tokens + max(2 * tile.bn, tile.down_bn)
    assert 2 <= fitting.num_stages <= tile.num_stages
    assert (fitting.num_stages - 1) * rows * tile.row_bytes + OTHER_SHARED_BYTES <= ADA


def test_more_tokens_of_an_expert_have_a_larger_tile() -> None:
    wanted = {1: 16, 8: 16, 8.1: 32, 32: 32, 33: 64, 64: 64, 65: 128, 5000: 128}
    assert {tokens: FAST.expert_rows(tokens) for tokens in wanted} == wanted
    assert INVARIANT.expert_rows(5000) == 64
