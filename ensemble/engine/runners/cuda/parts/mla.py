"""Latent attention: norm → q and the compressed entry → cache → absorbed attention → values → o."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepseek_triton.ensemble.decoder.mla import INNER_NORM_EPS, LatentAttention
from deepseek_triton.ensemble.engine.runners.cuda.buffers import Prompts
from deepseek_triton.ensemble.engine.runners.cuda.caches import Caches
from deepseek_triton.ensemble.engine.runners.cuda.decode_gemv import DecodeGemv
from deepseek_triton.ensemble.engine.runners.cuda.latent import LatentKernels, Projected
from deepseek_triton.ensemble.engine.runners.cuda.linear import DeviceLinear, Parts
from deepseek_triton.ensemble.engine.runners.cuda.parts.part import CudaPart, DecodeStep, Tools
from deepseek_triton.ensemble.engine.runners.cuda.parts.residual import Residual
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightLoader


@dataclass(frozen=True)
class MlaWeights:
    """norm: [hidden_size]. kv_norm: [kv_lora_rank]. q_norm [q_lora_rank] and q_b: None where the query has one matrix.

    kv_b: [num_heads, qk_nope_head_dim + v_head_dim, kv_lora_rank], never in FP8: queries and outputs are multiplied
    with its halves.
    """

    norm: torch.Tensor
    q_kv_a: DeviceLinear
    q_norm: torch.Tensor | None
    q_b: DeviceLinear | None
    kv_norm: torch.Tensor
    kv_b: torch.Tensor
    o: DeviceLinear

    @classmethod
    def load(cls, loader: WeightLoader, part: LatentAttention) -> MlaWeights:
        """Read one layer's."""
        is_compressed = part.options.q_lora_rank is not None
        kv_b = loader.tensor("kv_b.weight", loader.dtype)
        return cls(
            loader.tensor("attention_norm"),
            DeviceLinear.load(loader, "q_kv_a"),
            loader.tensor("q_a_norm") if is_compressed else None,
            DeviceLinear.load(loader, "q_b") if is_compressed else None,
            loader.tensor("kv_a_norm"),
            kv_b.view(part.num_heads, -1, part.options.kv_lora_rank),
            DeviceLinear.load(loader, "o"),
        )

    @property
    def matrices(self) -> tuple[DeviceLinear, ...]:
        """The matrices that rows are multiplied with, in the order in which they are used."""
        return (self.q_kv_a, self.o) if self.q_b is None else (self.q_kv_a, self.q_b, self.o)


class _MlaPass:
    """What prefill and decode have in common."""

    def __init__(self, tools: Tools, part: LatentAttention) -> None:
        self._ops, self._part = tools.ops, part
        self._kernels = LatentKernels(tools.ops.launch, tools.ops.plan, part, tools.cos, tools.sin)

    def _projected(self, residual: Residual, weights: MlaWeights) -> Projected:
        ops, first = self._ops, weights.q_kv_a
        normed = ops.norm(residual.hidden, residual.pending, residual.bias, weights.norm, first.is_fp8)
        both = ops.multiply(normed, first)
        if weights.q_b is None or weights.q_norm is None:
            return Projected(both, first.bias, both, first.bias, self._part.query.out_features)
        query = self._kernels.norm_query(both, first.bias, weights.q_norm, weights.q_b.is_fp8)
        query_parts = ops.multiply(query, weights.q_b)
        return Projected(query_parts, weights.q_b.bias, both, first.bias, len(weights.q_norm))

    def _project_output(self, output: torch.Tensor, residual: Residual, weights: MlaWeights) -> None:
        projected = self._ops.multiply(self._ops.quantise(output, weights.o), weights.o)
        residual.add(self._ops.sum_over_ranks(projected), weights.o.bias)


class MlaPrefill(_MlaPass):
    """Attention over packed prompts."""

    def __init__(self, tools: Tools, part: LatentAttention, prompts: Prompts) -> None:
        super().__init__(tools, part)
        self._prompts = prompts
        self._use_library = tools.ops.plan.use_library(len(prompts.ids))

    def __call__(self, residual: Residual, weights: MlaWeights, cache: Caches) -> None:
        """Run one layer's; cache: that layer's entries."""
        kernels, prompts, launch = self._kernels, self._prompts, self._ops.launch
        count, entry_size, use_library = len(prompts.ids), self._part.entry_size, self._use_library
        packed = launch.empty(count, entry_size, dtype=launch.dtype) if prompts.are_whole and use_library else None
        queries, plain = kernels.rows(
            self._projected(residual, weights), weights.kv_norm, weights.kv_b, prompts.slots, prompts.positions,
            cache, absorb=not use_library, packed=packed,
        )  # fmt: skip
        if packed is not None:
            output = kernels.prefill_whole(queries, plain, packed, weights.kv_b, prompts.tiles)
        else:
            if use_library:
                kernels.absorb(queries, plain, weights.kv_b)
            # Without the library what rows attended to is summed on in float32.
            dtype = launch.dtype if use_library else torch.float32
            attended = launch.empty(count, self._part.num_heads, self._part.options.kv_lora_rank, dtype=dtype)
            kernels.prefill(queries, cache, prompts.tiles, attended)
            output = kernels.values(attended, weights.kv_b, use_library=use_library)
        self._project_output(output, residual, weights)


class MlaDecode(_MlaPass):
    """Attention of one token of each slot."""

    def __init__(self, tools: Tools, part: LatentAttention, step: DecodeStep) -> None:
        super().__init__(tools, part)
        self._positions = step.positions
        self._output = tools.ops.launch.empty(len(step.positions), part.num_heads * part.options.v_head_dim)

    def __call__(self, residual: Residual, weights: MlaWeights, cache: Caches) -> None:
        """Run one layer's; cache: that layer's entries."""
        kernels, positions = self._kernels, self._positions
        projected = self._projected(residual, weights)
        queries, _ = kernels.rows(projected, weights.kv_norm, weights.kv_b, None, positions, cache)
        kernels.decode(queries, weights.kv_b, positions, cache, self._output)
        self._project_output(self._output, residual, weights)


class MlaDecodeGemv:
    """Attention of the token of slot 0, by matrix-vector kernels."""

    def __init__(self, gemv: DecodeGemv, tools: Tools, part: LatentAttention, step: DecodeStep) -> None:
        self._gemv, self._step = gemv, step
        self._kernels = LatentKernels(gemv.launch, gemv.plan, part, tools.cos, tools.sin)
        rank, self._query = part.options.q_lora_rank, part.query.out_features
        self._column = self._query if rank is None else rank
        self._first = gemv.launch.empty(1, 1, self._column + part.entry_size)
        self._queries = self._first if rank is None else gemv.launch.empty(1, 1, self._query)
        self._output = gemv.launch.empty(1, part.num_heads * part.options.v_head_dim)

    def __call__(self, hidden: torch.Tensor, weights: MlaWeights, cache: Caches) -> None:
        """Run one layer's on `hidden` [1, hidden_size]; cache: that layer's entries."""
        gemv, kernels, positions = self._gemv, self._kernels, self._step.positions
        gemv.norm_gemv(hidden, weights.norm, weights.q_kv_a, self._first, gemv.mlp_amax)
        if weights.q_b is not None and weights.q_norm is not None:
            gemv.norm_gemv(
                self._first, weights.q_norm, weights.q_b, self._queries, gemv.mlp_amax, eps=INNER_NORM_EPS
            )  # fmt: skip
        projected = Projected(Parts(self._queries), None, Parts(self._first), None, self._column)
        queries, _ = kernels.rows(projected, weights.kv_norm, weights.kv_b, None, positions, cache)
        kernels.decode(queries, weights.kv_b, positions, cache, self._output, self._step.amax)
        gemv.add(self._output, self._step.amax, weights.o, hidden)


PART = CudaPart(load=MlaWeights.load, prefill=MlaPrefill, decode=MlaDecode, gemv=MlaDecodeGemv)
