"""Matrix-vector products for decoding one row, each fused with the norm or activation before it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton

from deepseek_triton.ensemble.engine.runners.cuda.group import Group
from deepseek_triton.ensemble.engine.runners.cuda.kernels import gemv
from deepseek_triton.ensemble.engine.runners.cuda.kernels.experts import activate_experts, add_experts
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.linear import DeviceLinear, Rows
from deepseek_triton.ensemble.engine.runners.cuda.plan import KernelPlan

if TYPE_CHECKING:
    from deepseek_triton.ensemble.engine.runners.cuda.parts.router import RowRouting


class DecodeGemv:
    """The operations of a layer on one row, attention aside.

    FP8 scales an activation by its largest magnitude. The kernel that writes the activation raises `attention_amax` or
    `mlp_amax` [1] to it; the kernel after the reader sets it to 0 again. attention_amax must be 0 before a step.
    """

    def __init__(self, launch: Launcher, plan: KernelPlan, rms_norm_eps: float, group: Group | None = None) -> None:
        self.plan, self.launch = plan, launch
        self._eps, self._group = rms_norm_eps, group
        self.attention_amax, self.mlp_amax = launch.empty(1).zero_(), launch.empty(1).zero_()
        self.finished = launch.empty(1, dtype=torch.int32).zero_()  # programs of a kernel whose last one goes on

    def norm_gemv(
        self,
        hidden: torch.Tensor,
        norm: torch.Tensor,
        linear: DeviceLinear,
        out: torch.Tensor,
        zero: torch.Tensor,
        eps: float | None = None,
    ) -> None:
        """out = norm(hidden) @ weight.T + bias, of hidden's first columns; `zero` [1] = 0. eps: None: the decoder's."""
        n, k = linear.weight.shape
        tile, or_nothing = self.plan.gemv[linear.name], self.launch.or_nothing
        self.launch(
            gemv.norm_gemv, (triton.cdiv(n, tile.bn),),
            hidden, norm, linear.weight, or_nothing(linear.scale), or_nothing(linear.bias), out, zero,
            self._eps if eps is None else eps, k,
            N=n, K=k, BN=tile.bn, BK=triton.next_power_of_2(k), FP8=linear.is_fp8,
            HAS_BIAS=linear.bias is not None, num_warps=tile.num_warps,
        )  # fmt: skip

    def norm_gemv_silu(self, hidden: torch.Tensor, norm: torch.Tensor, linear: DeviceLinear, out: torch.Tensor) -> None:
        """out = silu(gate) * up of the normed row; mlp_amax = max |out|; attention_amax = 0."""
        n, k = linear.weight.shape[0] // 2, linear.weight.shape[1]
        columns, or_nothing = triton.next_power_of_2(k), self.launch.or_nothing
        row_bytes = 2 * columns * linear.weight.element_size()  # gate's and up's
        tile = self.plan.gemv[linear.name].fitting(row_bytes, self.launch.shared_bytes)
        self.launch(
            gemv.norm_gemv_silu, (self._programs(tile.programs, n, tile.bn),),
            hidden, norm, linear.weight, or_nothing(linear.scale), or_nothing(linear.bias), out,
            self.mlp_amax, self.attention_amax, self._eps, k,
            N=n, K=k, BN=tile.bn, BK=columns, STAGES=tile.stages, FP8=linear.is_fp8,
            HAS_BIAS=linear.bias is not None, num_warps=tile.num_warps,
        )  # fmt: skip

    def residual_gemv(self, x: torch.Tensor, amax: torch.Tensor, linear: DeviceLinear, hidden: torch.Tensor) -> None:
        """hidden += x @ weight.T + bias; amax [1]: max |x|."""
        n, k = linear.weight.shape
        tile, or_nothing = self.plan.gemv[linear.name], self.launch.or_nothing
        self.launch(
            gemv.residual_gemv, (triton.cdiv(n, tile.bn),),
            x, amax, linear.weight, or_nothing(linear.scale), or_nothing(linear.bias), hidden, k,
            N=n, K=k, BN=tile.bn, BK=min(tile.bk, triton.next_power_of_2(k)),
            FP8=linear.is_fp8, HAS_BIAS=linear.bias is not None, num_warps=tile.num_warps,
        )  # fmt: skip

    def add(self, x: torch.Tensor, amax: torch.Tensor, linear: DeviceLinear, hidden: torch.Tensor) -> None:
        """`residual_gemv` summed over all ranks: rank 0 adds its part to residual and bias, the others to zero."""
        if self._group is not None and self._group.split.rank > 0:
            hidden.zero_()
            linear = replace(linear, bias=None)
        self.residual_gemv(x, amax, linear, hidden)
        if self._group is not None:
            self._group.add(hidden)

    def activate_experts(self, x: Rows, routing: RowRouting, gate_up: DeviceLinear) -> torch.Tensor:
        """silu(gate) * up of the row `x` for each of its experts: [experts of a token, out]; raises `routing.amax`."""
        (experts, n, k), count, or_nothing = gate_up.weight.shape, len(routing.chosen), self.launch.or_nothing
        n, tile = n // 2, self.plan.gemv[gate_up.name]
        out = self.launch.empty(count, n, dtype=self.launch.dtype)
        self.launch(
            activate_experts, (triton.cdiv(n, tile.bn), count),
            x.values, or_nothing(x.scale), gate_up.weight, or_nothing(gate_up.scale), routing.chosen, out,
            routing.amax, k, E=experts, OUT=n, K=k, BN=tile.bn, BK=triton.next_power_of_2(k), FP8=gate_up.is_fp8,
            num_warps=tile.num_warps,
        )  # fmt: skip
        return out

    def add_experts(self, x: torch.Tensor, routing: RowRouting, down: DeviceLinear, hidden: torch.Tensor) -> None:
        """hidden += each expert's row of `x` [experts of a token, in] @ its matrix of `down`.T, weighted."""
        (count, k), (experts, n, _) = x.shape, down.weight.shape
        block = max(16, triton.next_power_of_2(k))
        tile = self.plan.gemv[down.name]
        free = self.launch.shared_bytes - tile.stages * block * x.element_size()  # x waits there too
        tile = tile.fitting(block * down.weight.element_size(), free)
        self.launch(
            add_experts, (triton.cdiv(n, tile.bn),),
            x, routing.amax, down.weight, self.launch.or_nothing(down.scale), routing.chosen, routing.weights, hidden,
            k, E=experts, N=n, K=k, COUNT=count, BN=tile.bn, BK=block, STAGES=tile.stages, FP8=down.is_fp8,
            num_warps=tile.num_warps,
        )  # fmt: skip

    def _programs(self, per_processor: int, n: int, bn: int) -> int:
        tiles = int(triton.cdiv(n, bn))
        return min(tiles, per_processor * self.launch.processors) if per_processor else tiles
