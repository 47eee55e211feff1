"""A mixture of experts: norm → router → each token's experts, and the shared ones → their weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from deepseek_triton.ensemble.artefacts.cuda_layout import BLOCK_COLUMNS
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.options import ExpertOptions
from deepseek_triton.ensemble.engine.runners.cuda.decode_gemv import DecodeGemv
from deepseek_triton.ensemble.engine.runners.cuda.kernels import experts
from deepseek_triton.ensemble.engine.runners.cuda.linear import DeviceLinear, LinearOps, Parts, Rows
from deepseek_triton.ensemble.engine.runners.cuda.parts.part import CudaPart, DecodeStep, Tools
from deepseek_triton.ensemble.engine.runners.cuda.parts.residual import Residual
from deepseek_triton.ensemble.engine.runners.cuda.parts.router import Router, RouterWeights, Routing
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightLoader


@dataclass(frozen=True)
class MoeWeights:
    """norm: [hidden_size]. gate_up and down: of all experts, [num_experts, out, in]; shared: gate_up and down, or None.

    An expert's gate_up holds its gate, then its up. num_always: experts at the stacks' end that every token gets.
    """

    norm: torch.Tensor
    router: RouterWeights
    gate_up: DeviceLinear
    down: DeviceLinear
    shared: tuple[DeviceLinear, DeviceLinear] | None
    num_always: int = 0

    @classmethod
    def load(cls, loader: WeightLoader, *, has_shared: bool) -> MoeWeights:
        """Read one layer's."""
        gate_up, down = (DeviceLinear.load(loader, f"experts_{name}") for name in ("gate_up", "down"))
        shared = None
        if has_shared:
            shared = DeviceLinear.load(loader, "shared_gate_up"), DeviceLinear.load(loader, "shared_down")
        return cls(loader.tensor("mlp_norm"), RouterWeights.load(loader), gate_up, down, shared).stacked()

    def stacked(self) -> MoeWeights:
        """The same with the shared experts in the stacks, if they are stored alike: so they need no kernels."""
        if self.shared is None or self.shared[0].bias is not None or self.shared[1].bias is not None:
            return self
        gate_up, down = self.shared
        if (gate_up.is_fp8, down.is_fp8) != (self.gate_up.is_fp8, self.down.is_fp8):
            return self
        width = self.down.weight.shape[-1]
        count, left = divmod(down.weight.shape[-1], width)
        if left:  # a rank has less of the shared experts than of each of its own
            return self
        if self.down.num_blocks and width % BLOCK_COLUMNS and count > 1:
            return self  # a block of the shared experts' columns would be two experts'

        def by_expert(tensor: torch.Tensor) -> torch.Tensor:
            """gate_up [2 count width, …], all gates first → [count, 2 width, …]."""
            gates_then_ups = tensor.view(2, count, width, *tensor.shape[1:])
            return gates_then_ups.transpose(0, 1).reshape(count, 2 * width, *tensor.shape[1:])

        gate_up_scale = None if gate_up.scale is None else by_expert(gate_up.scale)
        down_scale = down.scale
        if down_scale is not None and down.num_blocks:  # each expert's columns have blocks of their own
            down_scale = down_scale.view(len(down_scale), count, -1).transpose(0, 1)
        elif down_scale is not None:
            down_scale = down_scale.expand(count, -1)
        down_weight = down.weight.view(-1, count, width).transpose(0, 1)
        return MoeWeights(
            self.norm,
            self.router,
            _stacked(self.gate_up, by_expert(gate_up.weight), gate_up_scale),
            _stacked(self.down, down_weight, down_scale),
            None,
            count,
        )

    @property
    def matrices(self) -> tuple[DeviceLinear, ...]:
        """The matrices in the order in which they are used."""
        return self.gate_up, self.down, *(self.shared or ())


class MoeForward:
    """The mixture of any number of rows, in prefill and decode.

    Args:
        positions: [rows] int64; negative: the row has no token, and chooses no expert. None: every row has one.
        own: the experts that this rank has; None: all.
    """

    def __init__(
        self, ops: LinearOps, options: ExpertOptions, positions: torch.Tensor | None, own: range | None = None
    ) -> None:
        self._ops = ops
        self._router = Router(ops.launch, ops.plan, options, positions, own)
        self._has_all = own is None or len(own) == options.num_experts

    def __call__(self, residual: Residual, weights: MoeWeights) -> None:
        """Run one layer's."""
        ops = self._ops
        shared = weights.shared
        is_fp8 = weights.gate_up.is_fp8 or (shared is not None and shared[0].is_fp8)
        # The router reads the tokens in the network's dtype, whatever the experts read.
        plain = ops.launch.empty(*residual.hidden.shape, dtype=ops.launch.dtype)
        pending, bias = residual.pending, residual.bias
        normed = ops.norm(residual.hidden, pending, bias, weights.norm, is_fp8, plain=plain)
        routing = self._router(plain, weights.router, num_always=weights.num_always)

        def as_read(linear: DeviceLinear) -> Rows:
            return normed if linear.is_fp8 else Rows(plain, None)

        activated = self.multiply(as_read(weights.gate_up), weights.gate_up, routing)
        outputs = self.multiply(ops.quantise(activated, weights.down), weights.down, routing)
        if shared is None:
            residual.add(ops.sum_over_ranks(Parts(outputs), of_experts=True), None)
            return
        always = self._shared(as_read(shared[0]), *shared).tensor
        parts = Parts(torch.cat([outputs, always.to(outputs.dtype)]))
        residual.add(ops.sum_over_ranks(parts, of_experts=True), shared[1].bias)

    def multiply(self, x: Rows, linear: DeviceLinear, routing: Routing) -> torch.Tensor:
        """Each pair's row of `x` times its expert's matrix.

        Returns:
            Of gate_up, from tokens [rows, in]: activated [pairs, out]. Of down, from pairs [pairs, in]: weighted
            [experts of a token, rows, out], parts of the sum; of a row without a token they are undefined.
        """
        launch, order = self._ops.launch, routing.order
        tile = self._ops.plan.experts[order.block].fitting(order.block, launch.shared_bytes)
        rows, count = routing.chosen.shape
        _, width, k = linear.weight.shape
        is_gated = linear.name == "experts_gate_up"
        width, bn = (width // 2, tile.bn) if is_gated else (width, tile.down_bn)
        size = (rows * count, width) if is_gated else (count, rows, width)
        out = launch.empty(*size, dtype=launch.dtype)
        if not is_gated and not self._has_all:
            out.zero_()  # what other ranks' experts add to the sum
        launch(
            experts.grouped_gemm, (triton.cdiv(width, bn), len(order.tiles)),
            x.values, launch.or_nothing(x.scale), linear.weight, launch.or_nothing(linear.scale),
            order.tiles, order.order, routing.weights, out, rows,
            OUT=width, K=k, COUNT=count, BM=order.block, BN=bn,
            BK=BLOCK_COLUMNS if linear.num_blocks else tile.row_bytes // linear.weight.element_size(),
            BLOCKS=linear.num_blocks, GATED=is_gated, FP8=linear.is_fp8, FAST=tile.fast_sums,
            PRECISION=launch.precision, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return out

    def _shared(self, x: Rows, gate_up: DeviceLinear, down: DeviceLinear) -> Parts:
        ops = self._ops
        return ops.multiply(ops.silu(ops.multiply(x, gate_up), gate_up.bias, down.is_fp8), down)


class MoeGemv:
    """The mixture of one row: the router in the norm's kernel, and the experts' sum in that of their second product."""

    def __init__(self, gemv: DecodeGemv, tools: Tools, part: MixtureOfExperts, step: DecodeStep) -> None:
        self._gemv, self._eps = gemv, tools.shape.rms_norm_eps
        self._router = Router(gemv.launch, gemv.plan, part.options, step.positions, part.experts)

    def __call__(self, hidden: torch.Tensor, weights: MoeWeights) -> None:
        """Run one layer's on `hidden` [1, hidden_size]."""
        normed, plain, routing = self._router.normed(
            hidden, weights.norm, weights.router, self._gemv,
            eps=self._eps, is_fp8=weights.gate_up.is_fp8, num_always=weights.num_always,
        )  # fmt: skip
        x = normed if weights.gate_up.is_fp8 else Rows(plain, None)
        activated = self._gemv.activate_experts(x, routing, weights.gate_up)
        self._gemv.add_experts(activated, routing, weights.down, hidden)


def _stacked(stack: DeviceLinear, weights: torch.Tensor, scales: torch.Tensor | None) -> DeviceLinear:
    """`stack` with more matrices behind its own."""
    all_scales = None if stack.scale is None or scales is None else torch.cat([stack.scale, scales])
    # As bytes: torch joins no E4M3.
    both = [tensor.contiguous().view(torch.uint8) for tensor in (stack.weight, weights)]
    return DeviceLinear(stack.name, torch.cat(both).view(stack.weight.dtype), all_scales, None)


PART = CudaPart(
    load=lambda loader, part: MoeWeights.load(loader, has_shared=part.shared_size > 0),
    prefill=lambda tools, part, prompts: MoeForward(tools.ops, part.options, prompts.positions, part.experts),
    decode=lambda tools, part, step: MoeForward(tools.ops, part.options, step.positions, part.experts),
    gemv=MoeGemv,
)
