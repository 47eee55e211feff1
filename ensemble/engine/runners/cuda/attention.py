"""Attention over the slots' KV caches: the kernels that prefill and decode launch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.kernels import attention, rows
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.linear import Parts
from deepseek_triton.ensemble.engine.runners.cuda.plan import KernelPlan

LOG2_E = 1.0 / math.log(2.0)
DECODE_BLOCK = 64  # cached positions that decode attention reads at a time
PREFILL_TILE = 128  # queries in one program of prefill attention


@dataclass(frozen=True)
class Caches:
    """Keys and values of every layer, each [layers, slots, kv_heads, max_seq_len, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor

    def layer(self, index: int) -> Caches:
        """One layer's, each [slots, kv_heads, max_seq_len, head_dim]."""
        return Caches(self.keys[index], self.values[index])


class Attention:
    """Rotary embedding, the update of the caches, and attention; cos and sin: [max_seq_len, head_dim / 2]."""

    def __init__(
        self, launch: Launcher, plan: KernelPlan, shape: DecoderShape, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        self.plan, self.shape = plan, shape
        self._launch, self._cos, self._sin = launch, cos, sin

    def decode(
        self,
        qkv: Parts,
        bias: torch.Tensor | None,
        qk_norms: torch.Tensor | None,
        positions: torch.Tensor,
        cache: Caches,
        finished_splits: torch.Tensor,
        out: torch.Tensor,
        amax: torch.Tensor,
    ) -> None:
        """Attend with one token of each slot, into `out` [rows, q_size] float32; write its key and value to the cache.

        Args:
            cache: one layer's.
            finished_splits: [slots, kv_heads] int32 zeros, and zeros again afterwards.
            amax: [1], raised to the largest magnitude of `out` where it is a single row.
        """
        launch, shape, count = self._launch, self.shape, len(positions)
        shared = shape.num_heads // shape.num_kv_heads
        group, half = max(16, triton.next_power_of_2(shared)), max(16, triton.next_power_of_2(shape.head_dim // 2))
        splits = self.plan.num_splits(count, shape.num_kv_heads, launch.processors)
        partial = launch.empty(count * shape.num_kv_heads * splits * group, shape.head_dim)
        partial_max, partial_sum = (launch.empty(count * shape.num_kv_heads * splits * group) for _ in range(2))
        launch(
            attention.decode_attention, (splits, shape.num_kv_heads, count),
            qkv.tensor, launch.or_nothing(bias), launch.or_nothing(qk_norms), self._cos, self._sin, positions,
            cache.keys, cache.values, partial, partial_max, partial_sum, finished_splits, out, amax,
            qkv.stride, shape.max_seq_len, shape.head_dim**-0.5 * LOG2_E, shape.rms_norm_eps,
            HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, D=shape.head_dim, GROUP=group, BLOCK_HALF=half,
            BLOCK=DECODE_BLOCK, SPLITS=splits, NUM_PARTS=qkv.count, HAS_BIAS=bias is not None, QK_NORM=shape.qk_norm,
            HAS_AMAX=count == 1, EARLY=splits > 1, PRECISION=launch.precision, num_warps=4,
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
            slots, positions, q, cache.keys, cache.values, qkv.stride, shape.max_seq_len, shape.rms_norm_eps,
            HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, D=shape.head_dim,
            BLOCK_HEADS=triton.next_power_of_2(shape.num_heads + 2 * shape.num_kv_heads),
            BLOCK_HALF=triton.next_power_of_2(shape.head_dim // 2), NUM_PARTS=qkv.count,
            HAS_BIAS=bias is not None, QK_NORM=shape.qk_norm, num_warps=4,
        )  # fmt: skip

    def prefill(self, q: torch.Tensor, cache: Caches, tiles: torch.Tensor, out: torch.Tensor) -> None:
        """Attend with the queries `q` that `rope` gave, into `out` [tokens, q_size]; tiles: of `PackedPrompts`."""
        shape = self.shape
        self._launch(
            attention.prefill_attention, (shape.num_heads, len(tiles)),
            q, cache.keys, cache.values, tiles, out, shape.max_seq_len, shape.head_dim**-0.5 * LOG2_E,
            HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, D=shape.head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(shape.head_dim)), BM=PREFILL_TILE, BN=64,
            PRECISION=self._launch.precision, num_warps=8, num_stages=3,
        )  # fmt: skip
