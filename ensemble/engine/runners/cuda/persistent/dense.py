"""Grouped-query attention and dense MLPs: kernels/persistent/dense.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from deepseek_triton.ensemble.engine.runners.cuda.persistent.family import Family, matrix
from deepseek_triton.ensemble.engine.runners.cuda.persistent.memory import (
    GRID_BYTES,
    WARPS,
    Memory,
    operand_bytes,
    stage_bytes,
)

if TYPE_CHECKING:
    import torch

    from deepseek_triton.ensemble.engine.runners.cuda.layers import Layer

HEAD_DIMS, MAX_SHARED_HEADS, MAX_KV_BLOCK = (32, 64, 128, 256), 16, 32  # as in the source
# Bytes that a block has in flight at most: enough to saturate memory; more delay what blocks tell each other
# (benchmarks/decode_gpu_notes.md).
IN_FLIGHT_BYTES = 4 * 14336


class DenseFamily(Family):
    """See the module."""

    SOURCE: ClassVar[str] = "dense.cu"

    def own_reason_against(self, num_ranks: int) -> str | None:
        """See `Family`."""
        shape = self.shape
        widths = (shape.hidden_size, shape.q_size, shape.intermediate_size)
        if any(width % 16 for width in widths):
            return f"widths {widths} are not multiples of 16"
        if shape.head_dim not in HEAD_DIMS:
            return f"head_dim {shape.head_dim} is not 32, 64, 128 or 256"
        if shape.num_heads // shape.num_kv_heads > MAX_SHARED_HEADS or shape.num_kv_heads > self.blocks:
            return f"{shape.num_heads} query heads on {shape.num_kv_heads} key heads"
        return None

    @property
    def memory(self) -> Memory:
        """See `Family`."""
        shape = self.shape
        widest = max(shape.q_size, shape.intermediate_size, shape.hidden_size)
        activations = max(operand_bytes(widest, is_fp8=self.is_fp8), operand_bytes(shape.hidden_size, is_fp8=False))
        stage = stage_bytes(shape.hidden_size * (1 if self.is_fp8 else 2))
        return Memory.of(
            stage, max(activations, self._attention_bytes), limit=self.shared_limit, in_flight=IN_FLIGHT_BYTES
        )

    @property
    def kv_block(self) -> int:
        """Cached positions of a stage."""
        return min(MAX_KV_BLOCK, self.memory.stage_bytes // (4 * self.shape.head_dim))

    @property
    def macros(self) -> dict[str, object]:
        """See `Family`."""
        shape = self.shape
        return {
            "INTERMEDIATE": shape.intermediate_size, "HEADS": shape.num_heads, "KV_HEADS": shape.num_kv_heads,
            "HEAD_DIM": shape.head_dim, "QK_NORM": int(shape.qk_norm), "KV_BLOCK": self.kv_block,
            "SCORE_SCALE": f"{shape.head_dim**-0.5 * math.log2(math.e):.9e}f",
        }  # fmt: skip

    @property
    def work_bytes(self) -> int:
        """See `Family`."""
        shape = self.shape
        partial = self._splits * shape.num_heads * (shape.head_dim + 2)
        grid = GRID_BYTES // 4
        return 4 * (
            2 * shape.q_size + 2 * shape.kv_size + 2 * shape.hidden_size + shape.intermediate_size + partial
            + grid + shape.num_kv_heads
        )  # fmt: skip

    def tensors(self, layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """See `Family`."""
        norms = layer.attention.norm, layer.mlp.norm, layer.attention.qk_norms
        matrices = (tensor for linear in layer.matrices for tensor in matrix(linear))
        return [*norms, *matrices, keys, values]

    @property
    def _splits(self) -> int:
        return self.blocks // self.shape.num_kv_heads

    @property
    def _attention_bytes(self) -> int:
        shape = self.shape
        shared, half = shape.num_heads // shape.num_kv_heads, shape.head_dim // 2
        q_and_new = (shared + 2) * shape.head_dim
        outputs = max(1, 32 * WARPS // half) * shared * shape.head_dim
        per_head = shared * (MAX_KV_BLOCK + 3 + self._splits)
        return 4 * (q_and_new + outputs + per_head + 1)
