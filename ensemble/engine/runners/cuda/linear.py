"""Norms, matrix products and activations of any number of rows, by the kernels that the plan names.

A matrix product may come in parts (split along the inner dimension); the kernel that reads it adds them up, and the
bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from deepseek_triton.ensemble.artefacts.cuda_layout import BLOCK_COLUMNS
from deepseek_triton.ensemble.engine.runners.cuda.group import Group
from deepseek_triton.ensemble.engine.runners.cuda.kernels import rows, small_m_gemm
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.peer_buffers import MAX_PEER_ROWS, PeerBuffers, RowPeerBuffers
from deepseek_triton.ensemble.engine.runners.cuda.plan import KernelPlan
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightLoader

# Of a matrix that is asked into L2 before its kernel may begin: larger ones push out each other's rows.
MAX_PREFETCHED_BYTES = 12 * 2**20
MAX_PREFETCHING_ROWS = 16  # of a program


@dataclass(frozen=True)
class DeviceLinear:
    """A stored matrix: weight [out, in], E4M3 codes where there is a scale; bias [out] or None.

    scale: [out], or [out, blocks] for every 128 columns; a stack of matrices has one more dimension in front of both.
    name: of the matrix within its layer, by which the plan knows it.
    """

    name: str
    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def load(cls, loader: WeightLoader, name: str) -> DeviceLinear:
        """Read the matrix `name`; a weight without a scale is converted to the loader's dtype."""
        scale, bias = loader.optional(f"{name}.scale"), loader.optional(f"{name}.bias")
        return cls(name, loader.tensor(f"{name}.weight", loader.dtype if scale is None else None), scale, bias)

    @property
    def is_fp8(self) -> bool:
        """Whether it is multiplied in E4M3."""
        return self.scale is not None

    @property
    def num_blocks(self) -> int:
        """Scales of a row, for 128 columns each; 0: a row has one."""
        return self.scale.shape[-1] if self.scale is not None and self.scale.ndim == self.weight.ndim else 0


@dataclass(frozen=True)
class Parts:
    """A matrix product as partial sums [n, rows, out]; is_of_rank: the other ranks' partial sums belong to it too."""

    tensor: torch.Tensor
    is_of_rank: bool = False

    @property
    def count(self) -> int:
        """Number of partial sums."""
        return self.tensor.shape[0]

    @property
    def stride(self) -> int:
        """Elements from one partial sum to the next."""
        return int(self.tensor.stride(0))


@dataclass(frozen=True)
class Rows:
    """Activations that a matrix is multiplied with: [rows, in], E4M3 codes where there is a scale [rows]."""

    values: torch.Tensor
    scale: torch.Tensor | None


class LinearOps:
    """The operations of a layer on rows, attention aside.

    row_peer_buffers: where `norm` adds up the partial sums of all ranks.
    """

    def __init__(self, launch: Launcher, plan: KernelPlan, rms_norm_eps: float, group: Group | None = None) -> None:
        self.plan, self.launch = plan, launch
        self._eps, self._group = rms_norm_eps, group
        self.row_peer_buffers = RowPeerBuffers.of(PeerBuffers.alone(launch.device), 0)

    def norm(
        self,
        hidden: torch.Tensor,
        parts: Parts | None,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
        is_fp8: bool,
        chosen: torch.Tensor | None = None,
        plain: torch.Tensor | None = None,
    ) -> Rows:
        """Add `parts` and `bias` to the residual stream `hidden`; the RMS norm of it, or of its `chosen` rows.

        plain: [rows, hidden_size] in the network's dtype, gets the norm too.
        """
        launch, width = self.launch, hidden.shape[1]
        count = len(hidden) if chosen is None else len(chosen)
        out, scale = self._rows(count, width, is_fp8)
        block = triton.next_power_of_2(width)
        peer_buffers = self.row_peer_buffers.peer_buffers
        launch(
            rows.norm_rows, (count,),
            hidden, hidden if chosen is None else chosen, hidden if parts is None else parts.tensor,
            launch.or_nothing(bias), weight, out, launch.or_nothing(scale), launch.or_nothing(plain),
            0 if parts is None else parts.stride, self._eps,
            peer_buffers.addresses, self.row_peer_buffers.counts, peer_buffers.given_up,
            H=width, BLOCK=block, NUM_PARTS=0 if parts is None else parts.count,
            HAS_BIAS=bias is not None, HAS_ROWS=chosen is not None, HAS_PLAIN=plain is not None, FP8=is_fp8,
            MAX_PEER_ROWS=MAX_PEER_ROWS,
            RANK=peer_buffers.rank, RANKS=peer_buffers.size if parts is not None and parts.is_of_rank else 1,
            num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
        return Rows(out, scale)

    def quantise(self, x: torch.Tensor, linear: DeviceLinear) -> Rows:
        """`x` [rows, in] in the dtype in which `linear` is multiplied."""
        if not linear.is_fp8:
            return Rows(x.to(self.launch.dtype), None)
        out, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), self.launch.empty(len(x))
        block = triton.next_power_of_2(x.shape[1])
        self.launch(
            rows.quantise_rows, (len(x),), x, out, scale,
            K=x.shape[1], BLOCK=block, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
        return Rows(out, scale)

    def silu(self, parts: Parts, bias: torch.Tensor | None, is_fp8: bool) -> Rows:
        """silu(gate) * up of the product [gate, up]; is_fp8: as E4M3 codes."""
        launch, count, width = self.launch, parts.tensor.shape[1], parts.tensor.shape[2] // 2
        out, scale = self._rows(count, width, is_fp8)
        main = triton.next_power_of_2(width + 1) // 2
        launch(
            rows.silu_rows, (count,),
            parts.tensor, launch.or_nothing(bias), out, launch.or_nothing(scale), parts.stride,
            I=width, MAIN=main, REST=triton.next_power_of_2(max(1, width - main)), NUM_PARTS=parts.count,
            HAS_BIAS=bias is not None, FP8=is_fp8, num_warps=max(1, min(16, main // 256)),
        )  # fmt: skip
        return Rows(out, scale)

    def multiply(self, x: Rows, linear: DeviceLinear) -> Parts:
        """x @ weight.T, without the bias."""
        count, n, k = len(x.values), *linear.weight.shape
        if self.plan.use_library(count) and _library_multiplies(linear):
            return Parts(_library_product(x, linear)[None])
        tile = self.plan.small_m[linear.name]
        row = tile.row_bytes // linear.weight.element_size()
        bm = min(64, max(16, triton.next_power_of_2(count)))
        parts = self.launch.empty(tile.num_parts, count, n)
        self.launch(
            small_m_gemm.small_m_gemm, (triton.cdiv(count, bm), triton.cdiv(n, tile.bn), tile.num_parts),
            x.values, self.launch.or_nothing(x.scale), linear.weight, self.launch.or_nothing(linear.scale), parts,
            count,
            N=n, K=k, BM=bm, BN=tile.bn, BK=BLOCK_COLUMNS if linear.num_blocks else row, BLOCKS=linear.num_blocks,
            NUM_PARTS=tile.num_parts, FP8=linear.is_fp8,
            PREFETCH=(
                self.launch.prefetches and bm <= MAX_PREFETCHING_ROWS and linear.weight.nbytes <= MAX_PREFETCHED_BYTES
            ),
            LINE=min(tile.row_bytes, 128) // linear.weight.element_size(), PRECISION=self.launch.precision,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return Parts(parts)

    def head(self, normed: Rows, head: DeviceLinear) -> torch.Tensor:
        """Logits [rows, out] float32."""
        if self.plan.use_library(len(normed.values)):
            return torch.mm(normed.values, head.weight.t(), out_dtype=torch.float32)
        return self.multiply(normed, head).tensor[0]

    def sum_over_ranks(self, parts: Parts, *, of_experts: bool = False) -> Parts:
        """A product of this rank's columns → of all ranks'; of few rows, `norm` adds the ranks' partial sums up.

        of_experts: the ranks share out the experts, though they may each have all of attention and dense MLPs.
        """
        if self._group is None or (self._group.split.tensor_size == 1 and not of_experts):
            return parts
        if self.row_peer_buffers.peer_buffers.size > 1 and parts.tensor.shape[1] <= MAX_PEER_ROWS:
            return Parts(parts.tensor, is_of_rank=True)
        return Parts(self._group.sum_parts(parts.tensor)[None])

    def _rows(self, count: int, width: int, is_fp8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Uninitialised memory for `Rows`."""
        out = self.launch.empty(count, width, dtype=torch.float8_e4m3fn if is_fp8 else self.launch.dtype)
        return out, self.launch.empty(count) if is_fp8 else None


def _library_multiplies(linear: DeviceLinear) -> bool:
    """Whether cuBLAS does: not weights with a scale for each block, nor E4M3 whose sizes aren't multiples of 16."""
    return not linear.num_blocks and not (linear.is_fp8 and any(size % 16 for size in linear.weight.shape))


def _library_product(x: Rows, linear: DeviceLinear) -> torch.Tensor:
    if linear.scale is None or x.scale is None:
        return x.values @ linear.weight.t()
    return torch._scaled_mm(
        x.values, linear.weight.t(), x.scale[:, None], linear.scale[None, :],
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
