"""Rows through norms and matrices: any number of them, by the kernel that the plan has for it.

A product may come in parts that are still to be added up; whoever reads it next adds them, and the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from deepseek_triton.ensemble.engine.runners.cuda.kernels import rows, small_m_gemm
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.layers import Layer, Linear
from deepseek_triton.ensemble.engine.runners.cuda.peer_buffers import MOST_ROWS, PeerBuffers, RowPeerBuffers
from deepseek_triton.ensemble.engine.runners.cuda.plan import KernelPlan


@dataclass(frozen=True)
class Parts:
    """A matrix product in parts [n, rows, out], still to be added up; `is_of_rank`: over all ranks too."""

    tensor: torch.Tensor
    is_of_rank: bool = False

    @property
    def count(self) -> int:
        """How many parts there are."""
        return self.tensor.shape[0]

    @property
    def stride(self) -> int:
        """Elements from one part to the next."""
        return int(self.tensor.stride(0))


@dataclass(frozen=True)
class Rows:
    """What a matrix is multiplied with: [rows, in], E4M3 codes where there is a scale [rows]."""

    values: torch.Tensor
    scale: torch.Tensor | None


class LinearOps:
    """What a layer does to rows, attention aside.

    row_peer_buffers: where `norm` sums up what each rank has a part of.
    """

    def __init__(self, launch: Launcher, plan: KernelPlan, rms_norm_eps: float) -> None:
        self.plan = plan
        self._launch, self._eps = launch, rms_norm_eps
        self.row_peer_buffers = RowPeerBuffers.of(PeerBuffers.alone(launch.device), 0)

    def norm(
        self,
        hidden: torch.Tensor,
        parts: Parts | None,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
        is_fp8: bool,
        chosen: torch.Tensor | None = None,
    ) -> Rows:
        """RMS norm of the residual stream, or of its `chosen` rows, after what is still to be added to it."""
        launch, width = self._launch, hidden.shape[1]
        count = len(hidden) if chosen is None else len(chosen)
        out, scale = self._rows(count, width, is_fp8)
        block = triton.next_power_of_2(width)
        peer_buffers = self.row_peer_buffers.peer_buffers
        launch(
            rows.norm_rows, (count,),
            hidden, hidden if chosen is None else chosen, hidden if parts is None else parts.tensor,
            launch.or_nothing(bias), weight, out, launch.or_nothing(scale),
            0 if parts is None else parts.stride, self._eps,
            peer_buffers.addresses, self.row_peer_buffers.counts, peer_buffers.given_up,
            H=width, BLOCK=block, NUM_PARTS=0 if parts is None else parts.count,
            HAS_BIAS=bias is not None, HAS_ROWS=chosen is not None, FP8=is_fp8, MOST_ROWS=MOST_ROWS,
            RANK=peer_buffers.rank, RANKS=peer_buffers.size if parts is not None and parts.is_of_rank else 1,
            num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
        return Rows(out, scale)

    def quantise(self, x: torch.Tensor, linear: Linear) -> Rows:
        """`x` [rows, in] as `linear` reads it."""
        if not linear.is_fp8:
            return Rows(x.to(self._launch.dtype), None)
        out, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), self._launch.empty(len(x))
        block = triton.next_power_of_2(x.shape[1])
        self._launch(
            rows.quantise_rows, (len(x),), x, out, scale,
            K=x.shape[1], BLOCK=block, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
        return Rows(out, scale)

    def silu(self, parts: Parts, layer: Layer) -> Rows:
        """silu(gate) * up of gate_up's product, as `down` reads it."""
        launch, count, width = self._launch, parts.tensor.shape[1], parts.tensor.shape[2] // 2
        bias = layer.gate_up.bias
        out, scale = self._rows(count, width, layer.down.is_fp8)
        block = min(4096, triton.next_power_of_2(width))
        launch(
            rows.silu_rows, (count,),
            parts.tensor, launch.or_nothing(bias), out, launch.or_nothing(scale), parts.stride,
            I=width, BLOCK=block, NUM_PARTS=parts.count, HAS_BIAS=bias is not None, FP8=layer.down.is_fp8,
            num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
        return Rows(out, scale)

    def multiply(self, x: Rows, linear: Linear) -> Parts:
        """x @ weight.T, without the bias."""
        count, n, k = len(x.values), *linear.weight.shape
        if self.plan.use_library(count):
            return Parts(_library_product(x, linear)[None])
        tile = self.plan.small_m[linear.name]
        bm = min(64, max(16, triton.next_power_of_2(count)))
        parts = self._launch.empty(tile.num_parts, count, n)
        self._launch(
            small_m_gemm.small_m_gemm, (triton.cdiv(count, bm), triton.cdiv(n, tile.bn), tile.num_parts),
            x.values, self._launch.or_nothing(x.scale), linear.weight, self._launch.or_nothing(linear.scale), parts,
            count,
            N=n, K=k, BM=bm, BN=tile.bn, BK=tile.row_bytes // linear.weight.element_size(),
            NUM_PARTS=tile.num_parts, FP8=linear.is_fp8, PRECISION=self._launch.precision, num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip
        return Parts(parts)

    def head(self, normed: Rows, head: Linear) -> torch.Tensor:
        """Logits [rows, out] float32."""
        if self.plan.use_library(len(normed.values)):
            return torch.mm(normed.values, head.weight.t(), out_dtype=torch.float32)
        return self.multiply(normed, head).tensor[0]

    def _rows(self, count: int, width: int, is_fp8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Memory for `Rows`."""
        out = self._launch.empty(count, width, dtype=torch.float8_e4m3fn if is_fp8 else self._launch.dtype)
        return out, self._launch.empty(count) if is_fp8 else None


def _library_product(x: Rows, linear: Linear) -> torch.Tensor:
    if linear.scale is None or x.scale is None:
        return x.values @ linear.weight.t()
    return torch._scaled_mm(
        x.values, linear.weight.t(), x.scale[:, None], linear.scale[None, :],
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
