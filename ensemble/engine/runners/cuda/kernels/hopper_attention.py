"""Prefill attention for Hopper (bfloat16, pages of 64, heads of 64 or 128), by warps that have different work.

One warp copies blocks of the cache to shared memory. Two warpgroups attend to them, each with half of a tile's queries;
while a warpgroup exponentiates one block's scores, the tensor cores sum its block before. This is FlashAttention 3's
method (Shah et al. 2024, arXiv:2407.08608). The kernel is written in Gluon, Triton's language in which the author
chooses layouts, barriers and copies; it is written for Triton 3.6 to 3.8, and Triton's interpreter can't run it.

Blocks lie at multiples of BLOCK whatever the chunk is, so a query's result doesn't depend on how its prompt is cut.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from deepseek_triton.ensemble.engine.runners.cuda.caches import PAGE as CACHE_PAGE

NUM_WARPS = 4  # of the first warpgroup; the kernel adds another one and the copying warp
BOX = gl.constexpr(64)  # rows and columns of a copy
BOX_SHAPE = [BOX.value, BOX.value]
BOX_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
PAGE = gl.constexpr(CACHE_PAGE)  # a copy brings one; two are a BLOCK
GROUP = gl.constexpr(64)  # queries of a warpgroup
BLOCK = gl.constexpr(128)  # cached positions that are attended to at a time
STAGES = gl.constexpr(2)  # blocks of keys, and of values, in shared memory
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
VALUES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def prefill_attention(
    query_boxes,  # descriptor of the rotated queries [M, HEADS D], in boxes of BOX_SHAPE and BOX_LAYOUT
    key_boxes,  # likewise of the pages' keys, as rows of D elements
    value_boxes,
    table,  # [slots, extent] int32: each slot's pages
    tiles,  # [num_tiles, 4] int32: slot, position of the first query, its row, how many queries; 0 of these: none
    out,  # [M, HEADS, D]
    extent,
    scale,  # of the scores, times log2(e)
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,  # 64 or 128
    PDL: gl.constexpr,
):
    """2 GROUP queries of one chunk and head attend to their slot's pages up to their own positions."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, head = gl.program_id(1), gl.program_id(0)
    start = gl.load(tiles + 4 * tile + 1)
    row = gl.load(tiles + 4 * tile + 2)
    count = gl.load(tiles + 4 * tile + 3)
    pages = table + gl.load(tiles + 4 * tile).to(gl.int64) * extent
    if count == 0:
        return
    queries = gl.allocate_shared_memory(query_boxes.dtype, [2, GROUP, D], query_boxes.layout)
    keys = gl.allocate_shared_memory(key_boxes.dtype, [STAGES, BLOCK, D], key_boxes.layout)
    values = gl.allocate_shared_memory(value_boxes.dtype, [STAGES, BLOCK, D], value_boxes.layout)
    # Of each stage's keys, then of each stage's values, and last of the queries.
    loaded = gl.allocate_shared_memory(gl.int64, [1 + 2 * STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(1 + 2 * STAGES):
        mbarrier.init(loaded.index(i), count=1)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(free.index(i), count=2)
    shared = (queries, keys, values, loaded, free)
    gl.warp_specialize(
        [
            (_attend, (0, shared, start, row, count, head, out, scale, HEADS, D)),
            (_attend, (1, shared, start, row, count, head, out, scale, HEADS, D)),
            (_copy, (shared, query_boxes, key_boxes, value_boxes, pages, row, start + count, head, HEADS, KV_HEADS, D)),
        ],
        [4, 1],  # warps and registers of the second and the third
        [240, 24],
    )


@gluon.jit
def _copy(
    shared, query_boxes, key_boxes, value_boxes, pages, row, end, head,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Copy the queries, and one block after the other of the keys and values."""
    queries, keys, values, loaded, free = shared
    ready = loaded.index(2 * STAGES)
    mbarrier.expect(ready, 2 * GROUP * D * 2)
    for group in gl.static_range(2):
        _copy_box(query_boxes, queries.index(group), row + group * GROUP, head * D, ready, 0, GROUP, D)
    kv_head = head // (HEADS // KV_HEADS)
    last = (end - 1) // PAGE
    for block in range(0, gl.cdiv(end, BLOCK)):
        # The page behind the last one may be nobody's: the last one is copied again, and masked.
        first = gl.load(pages + 2 * block)
        second = gl.load(pages + gl.minimum(2 * block + 1, last))
        low, high = (first * KV_HEADS + kv_head) * PAGE, (second * KV_HEADS + kv_head) * PAGE
        stage, phase = block % STAGES, block // STAGES & 1
        for is_value in gl.static_range(2):
            boxes, buffers = (value_boxes, values) if is_value else (key_boxes, keys)
            ready = loaded.index(is_value * STAGES + stage)
            mbarrier.wait(free.index(is_value * STAGES + stage), phase ^ 1)
            mbarrier.expect(ready, BLOCK * D * 2)
            _copy_box(boxes, buffers.index(stage), low, 0, ready, 0, BLOCK, D)
            _copy_box(boxes, buffers.index(stage), high, 0, ready, 1, BLOCK, D)


@gluon.jit
def _copy_box(boxes, buffer, row, column, ready, part: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """Copy D columns of BOX rows to rows part · BOX, part · BOX + 1, … of a buffer [ROWS, D]."""
    # The buffer holds all rows of its first BOX columns, then all of the next.
    parts = buffer._reinterpret(boxes.dtype, [D // BOX * (ROWS // BOX), BOX, BOX], boxes.layout)
    for i in gl.static_range(D // BOX):
        to = parts.index(i * (ROWS // BOX) + part)
        tma.async_copy_global_to_shared(boxes, [row, column + i * BOX], ready, to)


@gluon.jit
def _attend(group: gl.constexpr, shared, start, row, count, head, out, scale, HEADS: gl.constexpr, D: gl.constexpr):
    """A warpgroup attends with its half of the queries to all blocks, one after the other."""
    queries, keys, values, loaded, free = shared
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    first = start + group * GROUP
    position = first + gl.arange(0, GROUP, gl.SliceLayout(1, SCORES))
    blocks = gl.cdiv(start + count, BLOCK)
    whole = (first + 1) // BLOCK  # every query sees all positions of so many blocks
    query = queries.index(group)

    mbarrier.wait(loaded.index(2 * STAGES), 0)
    mbarrier.wait(loaded.index(0), 0)
    score = warpgroup_mma_wait(0, deps=[_scores(query, keys.index(0))])
    mbarrier.arrive(free.index(0), count=1)
    score = _seen(score, position, 0)
    best = gl.max(score, axis=1)
    p = gl.exp2(score * scale - (best * scale)[:, None])
    total = gl.sum(p, axis=1)
    share = gl.convert_layout(p.to(query.dtype), gl.DotOperandLayout(0, out_layout, 2))
    acc = gl.zeros([GROUP, D], gl.float32, out_layout)
    for block in range(1, gl.maximum(whole, 1)):
        share, best, total, acc = _step(query, shared, position, scale, block, share, best, total, acc, False)
    for block in range(gl.maximum(whole, 1), blocks):
        share, best, total, acc = _step(query, shared, position, scale, block, share, best, total, acc, True)

    stage = (blocks - 1) % STAGES
    value = values.index(stage)
    mbarrier.wait(loaded.index(STAGES + stage), (blocks - 1) // STAGES & 1)
    if blocks * BLOCK > start + count:
        _clear(value, start + count - (blocks - 1) * BLOCK)
    acc = warpgroup_mma(share, value, acc)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, out_layout))[:, None]
    m = group * GROUP + gl.arange(0, GROUP, gl.SliceLayout(1, out_layout))
    d = gl.arange(0, D, gl.SliceLayout(0, out_layout))
    to = ((row + m).to(gl.int64) * HEADS + head)[:, None] * D + d[None, :]
    gl.store(out + to, acc.to(out.dtype.element_ty), mask=(m < count)[:, None])


@gluon.jit
def _step(query, shared, position, scale, block, share, best, total, acc, MASKED: gl.constexpr):
    """Score a block while the tensor cores sum the block before it.

    Takes `share`, the shares of the block before, and `acc`, the sum without it. Returns the shares of this block, best
    and total with it, and the sum of all blocks before it.
    """
    _, keys, values, loaded, free = shared
    stage, before = block % STAGES, (block - 1) % STAGES
    mbarrier.wait(loaded.index(stage), block // STAGES & 1)
    score = _scores(query, keys.index(stage))
    mbarrier.wait(loaded.index(STAGES + before), (block - 1) // STAGES & 1)
    summed = warpgroup_mma(share, values.index(before), warpgroup_mma_init(acc), is_async=True)
    score = warpgroup_mma_wait(1, deps=[score])
    mbarrier.arrive(free.index(stage), count=1)
    if MASKED:
        score = _seen(score, position, block)
    new_best = gl.maximum(best, gl.max(score, axis=1))
    p = gl.exp2(score * scale - (new_best * scale)[:, None])
    shrink = gl.exp2((best - new_best) * scale)
    total = total * shrink + gl.sum(p, axis=1)
    acc = warpgroup_mma_wait(0, deps=[summed])
    mbarrier.arrive(free.index(STAGES + before), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.convert_layout(p.to(query.dtype), share.type.layout), new_best, total, acc


@gluon.jit
def _scores(query, key):
    """Begin to multiply the queries with a block's keys."""
    none = warpgroup_mma_init(gl.zeros([GROUP, BLOCK], gl.float32, SCORES))
    return warpgroup_mma(query, key.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _seen(score, position, block):
    """A block's scores where the queries at `position` see its positions."""
    cached = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    return gl.where(cached[None, :] <= position[:, None], score, -float("inf"))


@gluon.jit
def _clear(value, count):
    """Set a block's values from row `count` on to zero: 0 x NaN would be NaN. Both warpgroups write the same."""
    n = gl.arange(0, BLOCK, gl.SliceLayout(1, VALUES))
    kept = value.load(VALUES)
    value.store(gl.where((n < count)[:, None], kept, gl.zeros_like(kept)))
    fence_async_shared()
