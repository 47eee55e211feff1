"""The gated MLP: norm → gate_up → silu(gate) * up → down."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepseek_triton.ensemble.engine.runners.cuda.decode_gemv import DecodeGemv
from deepseek_triton.ensemble.engine.runners.cuda.linear import DeviceLinear, LinearOps
from deepseek_triton.ensemble.engine.runners.cuda.parts.part import CudaPart
from deepseek_triton.ensemble.engine.runners.cuda.parts.residual import Residual
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightLoader


@dataclass(frozen=True)
class DenseMlpWeights:
    """norm: [hidden_size]."""

    norm: torch.Tensor
    gate_up: DeviceLinear
    down: DeviceLinear

    @classmethod
    def load(cls, loader: WeightLoader) -> DenseMlpWeights:
        """Read one layer's."""
        return cls(loader.tensor("mlp_norm"), DeviceLinear.load(loader, "gate_up"), DeviceLinear.load(loader, "down"))

    @property
    def matrices(self) -> tuple[DeviceLinear, ...]:
        """The matrices in the order in which they are used."""
        return self.gate_up, self.down


class DenseMlpForward:
    """The MLP of any number of rows, in prefill and decode."""

    def __init__(self, ops: LinearOps) -> None:
        self._ops = ops

    def __call__(self, residual: Residual, weights: DenseMlpWeights) -> None:
        """Run one layer's."""
        ops = self._ops
        normed = ops.norm(residual.hidden, residual.pending, residual.bias, weights.norm, weights.gate_up.is_fp8)
        activated = ops.silu(ops.multiply(normed, weights.gate_up), weights.gate_up.bias, weights.down.is_fp8)
        residual.add(ops.sum_over_ranks(ops.multiply(activated, weights.down)), weights.down.bias)


class DenseMlpGemv:
    """The MLP of one row, by matrix-vector kernels."""

    def __init__(self, gemv: DecodeGemv, intermediate_size: int) -> None:
        self._gemv = gemv
        self._activated = gemv.launch.empty(1, intermediate_size)

    def __call__(self, hidden: torch.Tensor, weights: DenseMlpWeights) -> None:
        """Run one layer's on `hidden` [1, hidden_size]."""
        gemv = self._gemv
        gemv.norm_gemv_silu(hidden, weights.norm, weights.gate_up, self._activated)
        gemv.add(self._activated, gemv.mlp_amax, weights.down, hidden)


PART = CudaPart(
    load=lambda loader, part: DenseMlpWeights.load(loader),
    prefill=lambda tools, part, prompts: DenseMlpForward(tools.ops),
    decode=lambda tools, part, step: DenseMlpForward(tools.ops),
    gemv=lambda gemv, tools, part, step: DenseMlpGemv(gemv, part.intermediate_size),
)
