"""Grouped-query attention: norm → qkv → rotary embedding and KV cache → attention → o."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepseek_triton.ensemble.engine.runners.cuda.attention import Attention
from deepseek_triton.ensemble.engine.runners.cuda.buffers import Prompts
from deepseek_triton.ensemble.engine.runners.cuda.caches import Caches
from deepseek_triton.ensemble.engine.runners.cuda.decode_gemv import DecodeGemv
from deepseek_triton.ensemble.engine.runners.cuda.linear import DeviceLinear, LinearOps, Parts
from deepseek_triton.ensemble.engine.runners.cuda.parts.part import CudaPart, DecodeStep, Tools
from deepseek_triton.ensemble.engine.runners.cuda.parts.residual import Residual
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightLoader


@dataclass(frozen=True)
class GqaWeights:
    """norm: [hidden_size]. qk_norms: [2, head_dim], of q and of k; None: heads are not normed."""

    norm: torch.Tensor
    qk_norms: torch.Tensor | None
    qkv: DeviceLinear
    o: DeviceLinear

    @classmethod
    def load(cls, loader: WeightLoader, *, qk_norm: bool) -> GqaWeights:
        """Read one layer's."""
        norm, dtype = loader.tensor("attention_norm"), loader.dtype
        qk_norms = None
        if qk_norm:
            qk_norms = torch.stack([loader.tensor("q_norm", dtype), loader.tensor("k_norm", dtype)])
        return cls(norm, qk_norms, DeviceLinear.load(loader, "qkv"), DeviceLinear.load(loader, "o"))

    @property
    def matrices(self) -> tuple[DeviceLinear, ...]:
        """The matrices in the order in which they are used."""
        return self.qkv, self.o


class GqaPrefill:
    """Attention over packed prompts."""

    def __init__(self, ops: LinearOps, attention: Attention, prompts: Prompts) -> None:
        self._ops, self._attention, self._prompts = ops, attention, prompts
        self._q = ops.launch.empty(len(prompts.ids), attention.shape.q_size, dtype=ops.launch.dtype)
        self._output = torch.empty_like(self._q)

    def __call__(self, residual: Residual, weights: GqaWeights, cache: Caches) -> None:
        """Run one layer's; cache: that layer's keys and values."""
        attention, prompts = self._attention, self._prompts
        attention.rope(
            _qkv(self._ops, residual, weights), weights.qkv.bias, weights.qk_norms,
            prompts.slots, prompts.positions, self._q, cache,
        )  # fmt: skip
        attention.prefill(self._q, cache, prompts.tiles, self._output)
        _project_output(self._ops, self._output, residual, weights)


class GqaDecode:
    """Attention of one token of each slot."""

    def __init__(self, ops: LinearOps, attention: Attention, step: DecodeStep) -> None:
        self._ops, self._attention, self._step = ops, attention, step
        self._output = ops.launch.empty(len(step.positions), attention.shape.q_size)
        self._shared_out = attention.share_out(step.positions)

    def __call__(self, residual: Residual, weights: GqaWeights, cache: Caches) -> None:
        """Run one layer's; cache: that layer's keys and values."""
        self._attention.decode(
            _qkv(self._ops, residual, weights), weights.qkv.bias, weights.qk_norms,
            self._step.positions, self._shared_out, cache, self._step.finished_splits, self._output, self._step.amax,
        )  # fmt: skip
        _project_output(self._ops, self._output, residual, weights)


class GqaDecodeGemv:
    """Attention of the token of slot 0, by matrix-vector kernels."""

    def __init__(self, gemv: DecodeGemv, attention: Attention, step: DecodeStep) -> None:
        shape = attention.shape
        self._gemv, self._attention, self._step = gemv, attention, step
        self._qkv = gemv.launch.empty(1, 1, shape.q_size + 2 * shape.kv_size)
        self._output = gemv.launch.empty(1, shape.q_size)
        self._shared_out = attention.share_out(step.positions)

    def __call__(self, hidden: torch.Tensor, weights: GqaWeights, cache: Caches) -> None:
        """Run one layer's on `hidden` [1, hidden_size]; cache: that layer's keys and values."""
        gemv = self._gemv
        gemv.norm_gemv(hidden, weights.norm, weights.qkv, self._qkv, gemv.mlp_amax)
        self._attention.decode(
            Parts(self._qkv), None, weights.qk_norms,
            self._step.positions, self._shared_out, cache, self._step.finished_splits, self._output, self._step.amax,
        )  # fmt: skip
        gemv.add(self._output, gemv.attention_amax, weights.o, hidden)


def _attention(tools: Tools) -> Attention:
    return Attention(tools.ops.launch, tools.ops.plan, tools.shape, tools.cos, tools.sin)


def _qkv(ops: LinearOps, residual: Residual, weights: GqaWeights) -> Parts:
    """Queries, keys and values, without the bias."""
    normed = ops.norm(residual.hidden, residual.pending, residual.bias, weights.norm, weights.qkv.is_fp8)
    return ops.multiply(normed, weights.qkv)


def _project_output(ops: LinearOps, output: torch.Tensor, residual: Residual, weights: GqaWeights) -> None:
    """Attention's output [rows, q_size] through `o`."""
    projected = ops.multiply(ops.quantise(output, weights.o), weights.o)
    residual.add(ops.sum_over_ranks(projected), weights.o.bias)


PART = CudaPart(
    load=lambda loader, part: GqaWeights.load(loader, qk_norm=part.qk_norm),
    prefill=lambda tools, part, prompts: GqaPrefill(tools.ops, _attention(tools), prompts),
    decode=lambda tools, part, step: GqaDecode(tools.ops, _attention(tools), step),
    gemv=lambda gemv, tools, part, step: GqaDecodeGemv(gemv, _attention(tools), step),
)
