"""Attention over the slots' KV caches: the kernels that prefill and decode launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.caches import PAGE, Caches
from deepseek_triton.ensemble.engine.runners.cuda.kernels import attention, rows
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.linear import Parts
from deepseek_triton.ensemble.engine.runners.cuda.plan import MAX_SPLITS, KernelPlan


def has_gluon(version: str) -> bool:
    """Whether this version of Triton has the Gluon of `hopper_attention`: versions differ."""
    return (3, 6) <= tuple(map(int, version.split(".")[:2])) < (3, 9)


HAS_GLUON = has_gluon(triton.__version__)
if HAS_GLUON:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from deepseek_triton.ensemble.engine.runners.cuda.kernels import hopper_attention

LOG2_E = 1.0 / math.log(2.0)
DECODE_BLOCK = PAGE  # cached positions that decode attention reads at a time: they lie in one block
PREFILL_TILE = 128  # queries in one program of prefill attention; `hopper_attention` has no other
PREFILL_BLOCK = 64  # cached positions that it reads at a time


@dataclass(frozen=True)
class SharedOut:
    """A decode step's work, each item with a split of one row: see the kernel `share_out`.

    rows, splits: [items] int32. spans: [rows of the step] int32. most: splits of a row at most.
    """

    rows: torch.Tensor
    splits: torch.Tensor
    spans: torch.Tensor
    most: int


class Attention:
    """Rotary embedding, the update of the caches, and attention; cos and sin: [max_seq_len, head_dim / 2]."""

    def __init__(
        self, launch: Launcher, plan: KernelPlan, shape: DecoderShape, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        self.plan, self.shape = plan, shape
        self._launch, self._cos, self._sin = launch, cos, sin

    def share_out(self, positions: torch.Tensor) -> SharedOut:
        """Decide once for all layers which program of `decode` attends to which cached positions."""
        launch, count = self._launch, len(positions)
        splits = self.plan.splits or 0
        # About two programs a multiprocessor read the long texts, besides one for each row.
        extra = (
            count * (splits - 1) if splits else self.plan.extra_items(count, self.shape.num_kv_heads, launch.processors)
        )
        items, most = count + extra, splits or min(extra + 1, MAX_SPLITS)
        rows, item_splits = (launch.empty(items, dtype=torch.int32) for _ in range(2))
        spans = launch.empty(count, dtype=torch.int32)
        launch(
            attention.share_out, (1,), positions, rows, item_splits, spans, count,
            ITEMS=items, EXTRA=extra, MOST=most, SPLITS=splits, BLOCK=DECODE_BLOCK, ROWS=triton.next_power_of_2(count),
            ALL_ITEMS=triton.next_power_of_2(items), num_warps=4,
        )  # fmt: skip
        return SharedOut(rows, item_splits, spans, most)

    def decode(
        self,
        qkv: Parts,
        bias: torch.Tensor | None,
        qk_norms: torch.Tensor | None,
        positions: torch.Tensor,
        shared_out: SharedOut,
        cache: Caches,
        finished_splits: torch.Tensor,
        out: torch.Tensor,
        amax: torch.Tensor,
    ) -> None:
        """Attend with one token of each slot, into `out` [rows, q_size] float32; write its key and value to the cache.

        Args:
            shared_out: of these positions.
            cache: one layer's.
            finished_splits: [slots, kv_heads] int32 zeros, and zeros again afterwards.
            amax: [1], raised to the largest magnitude of `out` where it is a single row.
        """
        launch, shape, count = self._launch, self.shape, len(positions)
        shared = shape.num_heads // shape.num_kv_heads
        group, half = max(16, triton.next_power_of_2(shared)), max(16, triton.next_power_of_2(shape.head_dim // 2))
        items = len(shared_out.rows)
        partial = launch.empty(items * shape.num_kv_heads * group, shape.head_dim)
        partial_max, partial_sum = (launch.empty(items * shape.num_kv_heads * group) for _ in range(2))
        # Programs that are few load their first block before they wait.
        are_few = self.plan.num_splits(count, shape.num_kv_heads, launch.processors) > 1
        launch(
            attention.decode_attention, (shape.num_kv_heads, items),
            qkv.tensor, launch.or_nothing(bias), launch.or_nothing(qk_norms), self._cos, self._sin, positions,
            shared_out.rows, shared_out.splits, shared_out.spans, *self._of(cache),
            partial, partial_max, partial_sum, finished_splits, out, amax,
            qkv.stride, cache.extent, shape.head_dim**-0.5 * LOG2_E, shape.rms_norm_eps,
            HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, D=shape.head_dim, GROUP=group, BLOCK_HALF=half,
            BLOCK=DECODE_BLOCK, MOST=triton.next_power_of_2(shared_out.most), NUM_PARTS=qkv.count,
            HAS_BIAS=bias is not None, QK_NORM=shape.qk_norm,
            HAS_AMAX=count == 1, EARLY=are_few, **_reading(cache), PRECISION=launch.precision, num_warps=4,
        )  # fmt: skip

    def rope(
        self,
        qkv: Parts,
        bias: torch.Tensor | None,
        qk_norms: torch.Tensor | None,
        slots: torch.Tensor,
        positions: torch.Tensor,
        q: torch.Tensor,
        cache: Caches,
    ) -> None:
        """Rotate packed prompts' queries into `q` [tokens, q_size], and write their keys and values to the cache."""
        launch, shape = self._launch, self.shape
        launch(
            rows.rope_rows, (len(slots),),
            qkv.tensor, launch.or_nothing(bias), launch.or_nothing(qk_norms), self._cos, self._sin,
            slots, positions, q, *self._of(cache), qkv.stride, cache.extent, shape.rms_norm_eps,
            HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, D=shape.head_dim,
            BLOCK_HEADS=triton.next_power_of_2(shape.num_heads + 2 * shape.num_kv_heads),
            BLOCK_HALF=triton.next_power_of_2(shape.head_dim // 2), NUM_PARTS=qkv.count,
            HAS_BIAS=bias is not None, QK_NORM=shape.qk_norm, **_forms(cache), num_warps=4,
        )  # fmt: skip

    def prefill(self, q: torch.Tensor, cache: Caches, tiles: torch.Tensor, out: torch.Tensor) -> None:
        """Attend with the queries `q` that `rope` gave, into `out` [tokens, q_size]; tiles: of `PackedPrompts`."""
        shape, grid, scale = self.shape, (self.shape.num_heads, len(tiles)), self.shape.head_dim**-0.5 * LOG2_E
        if self._uses_hopper_kernel(cache):
            rows = (tensor.view(-1, shape.head_dim) for tensor in cache.stored)
            self._launch(
                hopper_attention.prefill_attention, grid,
                *map(tensor_descriptor, (q, *rows)), cache.table, tiles, out, cache.extent, scale,
                HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, D=shape.head_dim,
                num_warps=hopper_attention.NUM_WARPS,
            )  # fmt: skip
            return
        self._launch(
            attention.prefill_attention, grid, q, *self._of(cache), tiles, out, cache.extent, scale,
            HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, D=shape.head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(shape.head_dim)), BM=PREFILL_TILE, BN=PREFILL_BLOCK,
            **_reading(cache), PRECISION=self._launch.precision, num_warps=8,
        )  # fmt: skip

    def _uses_hopper_kernel(self, cache: Caches) -> bool:
        """Whether `hopper_attention` can prefill this cache here."""
        is_known = cache.page == PAGE and cache.key_scales is None and self.shape.head_dim in (64, 128)
        return HAS_GLUON and self._launch.is_hopper and is_known

    def _of(self, cache: Caches) -> tuple[torch.Tensor, ...]:
        """The cache's tensors as the kernels take them."""
        absent = map(self._launch.or_nothing, (cache.table, cache.key_scales, cache.value_scales))
        return cache.keys, cache.values, *absent


def tensor_descriptor(rows: torch.Tensor) -> Any:
    """The descriptor of a matrix, from which `hopper_attention` copies parts of BOX_SHAPE."""
    return TensorDescriptor.from_tensor(rows, hopper_attention.BOX_SHAPE, hopper_attention.BOX_LAYOUT)


def _forms(cache: Caches) -> dict[str, int | bool]:
    """The kernels' constants for the form of a cache."""
    return {"PAGE": cache.page, "KV_INT8": cache.key_scales is not None}


def _reading(cache: Caches) -> dict[str, int | bool]:
    """Likewise, of kernels that read it in a loop.

    A block's number is loaded before the block, so two more stages keep as many blocks on their way as with slots.
    """
    return {**_forms(cache), "num_stages": 5 if cache.page else 3}
