"""Latent attention and experts: kernels/persistent/latent.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from deepseek_triton.ensemble.decoder.mla import INNER_NORM_EPS, LatentAttention
from deepseek_triton.ensemble.decoder.options import ExpertOptions, LatentOptions
from deepseek_triton.ensemble.engine.runners.cuda.persistent.family import Family, matrix
from deepseek_triton.ensemble.engine.runners.cuda.persistent.memory import (
    GRID_BYTES,
    MAX_PAIRS,
    WARPS,
    Memory,
    aligned,
    operand_bytes,
    stage_bytes,
)

if TYPE_CHECKING:
    import torch

    from deepseek_triton.ensemble.engine.runners.cuda.layers import Layer

# As in the source.
MAX_HEADS, UNIT, ABSORBED, VALUE_ROWS, SHARES = 16, 14, 64, 16, 24  # SHARES: of a head, with padding
MAX_EXPERTS = 32  # of a token: a lane has one
PAIR = 2  # experts computed together
LAYER_BYTES = 160  # of the source's `Layer`
MAX_PARTS = 2 * MAX_PAIRS
IN_FLIGHT_BYTES = 3 * 16384  # of a block, at most: see dense.py


class LatentFamily(Family):
    """See the module."""

    SOURCE: ClassVar[str] = "latent.cu"

    def own_reason_against(self, num_ranks: int) -> str | None:
        """See `Family`."""
        if num_ranks > 1:
            return "latent attention runs on one GPU there"
        return self._reason_against_attention() or self._reason_against_experts()

    def _reason_against_attention(self) -> str | None:
        shape, latent = self.shape, self._latent
        if latent.q_lora_rank is not None:
            return "the query has two matrices"
        if shape.num_heads > MAX_HEADS:
            return f"{shape.num_heads} heads, more than {MAX_HEADS}"
        rank, rope, nope = latent.kv_lora_rank, latent.qk_rope_head_dim, latent.qk_nope_head_dim
        if rank not in (128, 256, 512, 1024) or rope % 16:
            return f"kv_lora_rank {rank} and qk_rope_head_dim {rope}"
        if nope < WARPS or nope % WARPS or nope + rope // 2 > 32 * WARPS or latent.v_head_dim % VALUE_ROWS:
            return f"qk_nope_head_dim {nope} and v_head_dim {latent.v_head_dim}"
        values = shape.num_heads * latent.v_head_dim
        widths = (shape.hidden_size, shape.intermediate_size, values)
        if any(width % 16 for width in widths):
            return f"widths {widths} are not multiples of 16"
        return None if self._are_whole(values) else f"values of width {values}"

    def _reason_against_experts(self) -> str | None:
        experts = self.shape.experts
        if experts is None:
            return "it has no experts"
        if experts.num_groups > 1 and experts.choice != "greedy":
            return "its router chooses among groups"
        most = max(experts.num_experts_per_tok, experts.num_shared_experts)
        width = experts.intermediate_size
        has_room = self._pair_rows <= MAX_PAIRS and PAIR * self._down_rows <= MAX_PARTS
        if width % 16 or not has_room or not self._are_whole(width):
            return f"experts of width {width}"
        if most > MAX_EXPERTS:
            return f"{most} experts of a token"
        if 4 * self.shape.hidden_size > self._stage:
            return f"hidden_size {self.shape.hidden_size}"
        return None

    @property
    def memory(self) -> Memory:
        """See `Family`."""
        shape, experts, rank = self.shape, self._experts, self._latent.kv_lora_rank
        most = max(experts.num_experts_per_tok, experts.num_shared_experts)
        groups = 8 * 32 * WARPS // rank
        scratch = max(
            self._operand(shape.hidden_size) + PAIR * self._operand(experts.intermediate_size),
            self._operand(shape.intermediate_size),
            self._operand(shape.num_heads * self._latent.v_head_dim),
            operand_bytes(shape.hidden_size, is_fp8=False),
            (MAX_HEADS + 1) * self._entry_stride + MAX_HEADS * (2 * SHARES + 8),
            4 * (rank + groups * (rank + 2)),  # an operand; groups of threads have a latent, a maximum and a sum each
            4 * self._latent.qk_head_dim,  # a head's query
        )
        scales = -(-most // PAIR) * PAIR * self._pair_rows + most * self._down_rows
        known = max(3, experts.first_dense_layers + 2) * LAYER_BYTES
        # A barrier, layers, 8 numbers of its splits, the experts chosen, scores, sums and scales.
        board = 8 + known + 4 * (8 + experts.num_experts_per_tok + experts.num_experts + WARPS + scales) + 8
        return Memory.of(self._stage, scratch, limit=self.shared_limit, in_flight=IN_FLIGHT_BYTES, board=board // 8 * 8)

    @property
    def macros(self) -> dict[str, object]:
        """See `Family`."""
        shape, latent, experts = self.shape, self._latent, self._experts
        attention = LatentAttention(shape.hidden_size, shape.num_heads, latent)
        return {
            "INTERMEDIATE": shape.intermediate_size, "HEADS": shape.num_heads, "NOPE": latent.qk_nope_head_dim,
            "ROPE": latent.qk_rope_head_dim, "VALUE": latent.v_head_dim, "LATENT": latent.kv_lora_rank,
            "DENSE_LAYERS": min(experts.first_dense_layers, shape.num_layers), "EXPERTS": experts.num_experts,
            "TOP_K": experts.num_experts_per_tok, "EXPERT_SIZE": experts.intermediate_size,
            "ALWAYS": experts.num_shared_experts, "SIGMOID": int(experts.scores == "sigmoid"),
            "BIASED": int(experts.choice == "group_top2"),
            "NORMALISED": int(experts.is_normalised), "EXPERT_SCALE": f"{experts.scale:.9e}f",
            "INNER_EPS": f"{INNER_NORM_EPS:.9e}f",
            "SCORE_SCALE": f"{attention.softmax_scale * math.log2(math.e):.9e}f",
        }  # fmt: skip

    @property
    def work_bytes(self) -> int:
        """See `Family`."""
        shape, latent, experts = self.shape, self._latent, self._experts
        entry = latent.kv_lora_rank + latent.qk_rope_head_dim
        floats = (
            shape.num_heads * (latent.qk_head_dim + latent.v_head_dim + entry) + 2 * entry + 2 * shape.hidden_size
            + shape.intermediate_size + experts.num_experts_per_tok * experts.intermediate_size
            + max(1, experts.num_shared_experts) * experts.intermediate_size
            + self.blocks * shape.num_heads * (latent.kv_lora_rank // 2 + 2) + experts.num_experts
        )  # fmt: skip
        return aligned(4 * floats + GRID_BYTES)

    def tensors(self, layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """See `Family`."""
        attention, mlp = layer.attention, layer.mlp
        router = (mlp.router.weight, mlp.router.bias) if hasattr(mlp, "router") else (None, None)
        return [
            attention.norm, mlp.norm, attention.kv_norm, *matrix(attention.q_kv_a), attention.kv_b,
            self._key_tiles(attention.kv_b), *matrix(attention.o),
            *matrix(mlp.gate_up), *matrix(mlp.down), *router, keys,
        ]  # fmt: skip

    def _key_tiles(self, kv_b: torch.Tensor) -> torch.Tensor:
        """The rows of `kv_b` that make keys [heads, kv_lora_rank / ABSORBED, qk_nope_head_dim, ABSORBED].

        A block's part lies side by side there: to copy it row by row takes longer than to read it.
        """
        heads, _, rank = kv_b.shape
        keys = kv_b[:, : self._latent.qk_nope_head_dim]
        return keys.reshape(heads, -1, rank // ABSORBED, ABSORBED).transpose(1, 2).contiguous()

    @property
    def _pair_rows(self) -> int:
        """Rows of gate of two experts that a block has, at most."""
        return -(-PAIR * self._experts.intermediate_size // (8 * self.blocks)) * 8

    @property
    def _down_rows(self) -> int:
        """Rows of down that a block has, at most."""
        return -(-self.shape.hidden_size // (8 * self.blocks)) * 8

    def _are_whole(self, width: int) -> bool:
        """Whether a stage holds two rows of so many elements."""
        return 2 * width * (1 if self.is_fp8 else 2) <= self._stage

    def _operand(self, width: int) -> int:
        return operand_bytes(width, is_fp8=self.is_fp8)

    @property
    def _stage(self) -> int:
        """Bytes of a stage: rows of a matrix, cached entries, or a head's columns of kv_b."""
        row = self.shape.hidden_size * (1 if self.is_fp8 else 2)
        columns = 2 * ABSORBED * self._latent.qk_nope_head_dim
        return max(stage_bytes(row), aligned(UNIT * self._entry_stride), aligned(columns))

    @property
    def _entry_stride(self) -> int:
        return 2 * (self._latent.kv_lora_rank + self._latent.qk_rope_head_dim) + 16

    @property
    def _latent(self) -> LatentOptions:
        assert self.shape.latent is not None
        return self.shape.latent

    @property
    def _experts(self) -> ExpertOptions:
        assert self.shape.experts is not None
        return self.shape.experts
