"""All-reduce of one row over the tensor-parallel ranks, inside the kernel that reads the sum, through peer buffers.

As in persistent/common.cu, a value and the sequence number of its sum are stored in one 64-bit word: a reader that sees
the sequence number has the value, and needs no fence. Sums use the two halves of each buffer in turn. Program m of a
rank exchanges with program m of the others.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _send(addresses, words, mask):
    """Store 64-bit words in another GPU's buffer."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.relaxed.sys.global.u64 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,l,r",
        [addresses, words, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def sum_over_ranks(
    own,  # [BLOCK] float32, this rank's part of row m
    peer_buffers,  # [RANKS] int64, addresses of [2, RANKS, MAX_PEER_ROWS, BLOCK] 64-bit words
    counts,  # [MAX_PEER_ROWS] int32, number of sums of each row so far, equal on all ranks; it may wrap around
    given_up,  # [1] int32, not 0: don't wait for other ranks
    m,
    column,
    mask,
    BLOCK: tl.constexpr,
    MAX_PEER_ROWS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
):
    """The sum of all ranks' parts, added in rank order: every rank gets the same bits."""
    count = tl.load(counts + m) + 1
    half = (count & 1).to(tl.int64) * (RANKS * MAX_PEER_ROWS * BLOCK)
    # A thread holds up to 16 neighbouring elements of a row. Words of neighbouring threads are adjacent, so that their
    # stores coalesce.
    place = half + m * BLOCK + column % 16 * (BLOCK // 16) + column // 16
    tag = count.to(tl.int64) << 32
    word = tag | (own.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            _send(tl.load(peer_buffers + rank) + 8 * (place + RANK * MAX_PEER_ROWS * BLOCK), word, mask)
    total = tl.zeros_like(own)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += own
        else:
            pointers = tl.load(peer_buffers + RANK).to(tl.pointer_type(tl.int64)) + place + rank * MAX_PEER_ROWS * BLOCK
            found, tries, waiting = word, count * 0, count * 0 + 1  # typed as in the loop's body
            while waiting > 0:
                found = tl.load(pointers, mask=mask, other=tag, volatile=True)
                waiting = tl.max(((found >> 32) != count).to(tl.int32))
                tries += 1
                if tries % 4096 == 0:
                    waiting = waiting * (tl.load(given_up, volatile=True) == 0).to(tl.int32)
            total += found.to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(counts + m, count)
    return total
