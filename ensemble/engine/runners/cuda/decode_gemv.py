"""Batch 1 by matrix-vector kernels: each reads its weights once, with the norm or activation before it fused."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.attention import Attention, Caches
from deepseek_triton.ensemble.engine.runners.cuda.group import Group
from deepseek_triton.ensemble.engine.runners.cuda.kernels import gemv
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.layers import DecoderWeights, Linear
from deepseek_triton.ensemble.engine.runners.cuda.linear import Parts
from deepseek_triton.ensemble.engine.runners.cuda.plan import KernelPlan


class DecodeGemv:
    """One token of slot 0 through the decoder.

    What is quantised next needs its largest value: the kernel that writes it raises `attention_amax` or `mlp_amax`
    [1], the one after its reader sets it to 0 again. attention_amax must be 0 before a step.
    """

    def __init__(
        self,
        launch: Launcher,
        plan: KernelPlan,
        shape: DecoderShape,
        weights: DecoderWeights,
        attention: Attention,
        group: Group | None = None,
    ) -> None:
        self.plan, self._group = plan, group
        self._launch, self._shape, self._weights, self._attention = launch, shape, weights, attention
        self.attention_amax, self.mlp_amax = launch.empty(1).zero_(), launch.empty(1).zero_()

    def __call__(
        self, hidden: torch.Tensor, positions: torch.Tensor, caches: Caches, arrived: torch.Tensor
    ) -> torch.Tensor:
        """Logits [1, vocab_size] float32, or this rank's, of the embedded token `hidden` [1, hidden_size]."""
        empty, shape, weights = self._launch.empty, self._shape, self._weights
        qkv = empty(1, 1, shape.matrices["qkv"][0])
        attended, product = empty(1, shape.q_size), empty(1, shape.intermediate_size)
        for index, layer in enumerate(weights.layers):
            self.norm_gemv(hidden, layer.attention_norm, layer.qkv, qkv, self.mlp_amax)
            self._attention.decode(
                Parts(qkv), None, layer, positions, caches.keys[index], caches.values[index], arrived, attended,
                self.attention_amax,
            )  # fmt: skip
            self._add(attended, self.attention_amax, layer.o, hidden)
            self.norm_gemv_silu(hidden, layer.mlp_norm, layer.gate_up, product)
            self._add(product, self.mlp_amax, layer.down, hidden)
        logits = empty(1, len(weights.head.weight))
        self.norm_gemv(hidden, weights.norm, weights.head, logits, self.mlp_amax)
        return logits

    def norm_gemv(
        self, hidden: torch.Tensor, norm: torch.Tensor, linear: Linear, out: torch.Tensor, zero: torch.Tensor
    ) -> None:
        """out = norm(hidden) @ weight.T + bias; `zero` [1] = 0."""
        n, k = linear.weight.shape
        tile, or_nothing = self.plan.gemv[linear.name], self._launch.or_nothing
        self._launch(
            gemv.norm_gemv, (triton.cdiv(n, tile.bn),),
            hidden, norm, linear.weight, or_nothing(linear.scale), or_nothing(linear.bias), out, zero,
            self._shape.rms_norm_eps, k,
            N=n, K=k, BN=tile.bn, BK=triton.next_power_of_2(k), FP8=linear.is_fp8,
            HAS_BIAS=linear.bias is not None, num_warps=tile.num_warps,
        )  # fmt: skip

    def norm_gemv_silu(self, hidden: torch.Tensor, norm: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
        """out = silu(gate) * up of the normed row, `mlp_amax` its largest, `attention_amax` 0."""
        n, k = linear.weight.shape[0] // 2, linear.weight.shape[1]
        columns, or_nothing = triton.next_power_of_2(k), self._launch.or_nothing
        row_bytes = 2 * columns * linear.weight.element_size()  # gate's and up's
        tile = self.plan.gemv[linear.name].fitting(row_bytes, self._launch.shared_bytes)
        self._launch(
            gemv.norm_gemv_silu, (self._programs(tile.programs, n, tile.bn),),
            hidden, norm, linear.weight, or_nothing(linear.scale), or_nothing(linear.bias), out,
            self.mlp_amax, self.attention_amax, self._shape.rms_norm_eps, k,
            N=n, K=k, BN=tile.bn, BK=columns, STAGES=tile.stages, FP8=linear.is_fp8,
            HAS_BIAS=linear.bias is not None, num_warps=tile.num_warps,
        )  # fmt: skip

    def residual_gemv(self, x: torch.Tensor, amax: torch.Tensor, linear: Linear, hidden: torch.Tensor) -> None:
        """hidden += x @ weight.T + bias; amax [1]: the largest of |x|."""
        n, k = linear.weight.shape
        tile, or_nothing = self.plan.gemv[linear.name], self._launch.or_nothing
        self._launch(
            gemv.residual_gemv, (triton.cdiv(n, tile.bn),),
            x, amax, linear.weight, or_nothing(linear.scale), or_nothing(linear.bias), hidden, k,
            N=n, K=k, BN=tile.bn, BK=min(tile.bk, triton.next_power_of_2(k)),
            FP8=linear.is_fp8, HAS_BIAS=linear.bias is not None, num_warps=tile.num_warps,
        )  # fmt: skip

    def _add(self, x: torch.Tensor, amax: torch.Tensor, linear: Linear, hidden: torch.Tensor) -> None:
        """`residual_gemv` over all ranks: the first adds its part to residual and bias, the others to zero."""
        if self._group is not None and self._group.split.rank > 0:
            hidden.zero_()
            linear = replace(linear, bias=None)
        self.residual_gemv(x, amax, linear, hidden)
        if self._group is not None:
            self._group.add(hidden)

    def _programs(self, per_processor: int, n: int, bn: int) -> int:
        tiles = int(triton.cdiv(n, bn))
        return min(tiles, per_processor * self._launch.processors) if per_processor else tiles
