"""Batch 1 in a single persistent kernel (kernels/persistent_decode.cu): its requirements, arguments and launch.

It needs bulk copies to shared memory (Hopper and later). Where it can't run, the kernels of gemv.py compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.engine.runners.cuda.caches import Caches
from deepseek_triton.ensemble.engine.runners.cuda.launcher import shared_bytes
from deepseek_triton.ensemble.engine.runners.cuda.layers import DecoderWeights, Layer
from deepseek_triton.ensemble.engine.runners.cuda.nvrtc import Kernel
from deepseek_triton.ensemble.engine.runners.cuda.peer_buffers import PeerBuffers

SOURCE = Path(__file__).parent / "kernels" / "persistent_decode.cu"
CAPABILITY = (9, 0)
# As in the source.
WARPS, MAX_PAIRS, SHARED_HEADS_LIMIT, KV_BLOCK_LIMIT = 8, 160, 16, 32
STAGE_BYTES = 16384  # of a stage, at most
ALIGNMENT = 128
MIN_STAGES = 3
# Bytes that a block has in flight at most. On an H100 5.7 MB in flight saturate memory; more only delay the messages
# between blocks (benchmarks/decode_gpu_notes.md).
IN_FLIGHT_BYTES = 3 * 14336
KNOWN = (GroupedQueryAttention.NOUN, DenseMlp.NOUN)


@dataclass(frozen=True)
class Memory:
    """Layout of a block's shared memory in bytes. kv_block: cached positions in a stage.

    in_flight: stages that are being copied at a time, at most.
    """

    stages: int
    in_flight: int
    stage_bytes: int
    kv_block: int
    scratch_bytes: int
    total: int

    @classmethod
    def of(cls, shape: DecoderShape, *, is_fp8: bool, blocks: int, limit: int) -> Memory:
        """The layout with as many stages as fit into `limit` bytes."""
        row = shape.hidden_size * (1 if is_fp8 else 2)
        rows = next((rows for rows in (8, 4, 2) if rows * row <= STAGE_BYTES), 0)
        stage = _aligned(rows * row) if rows * row > STAGE_BYTES // 2 else STAGE_BYTES
        kv_block = min(KV_BLOCK_LIMIT, stage // (4 * shape.head_dim))
        widest = max(shape.q_size, shape.intermediate_size, shape.hidden_size)
        activations = max(widest * (2 if is_fp8 else 4), shape.hidden_size * 4)
        scratch = _aligned(max(activations, _attention_bytes(shape, blocks)))
        fixed = scratch + WARPS * 2 * MAX_PAIRS * 4 + 2 * WARPS * 4
        stages = (limit - fixed) // (stage + 16)
        in_flight = max(1, min(round(IN_FLIGHT_BYTES / stage), stages - 1))
        return cls(stages, in_flight, stage, kv_block, scratch, fixed + stages * (stage + 16))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _attention_bytes(shape: DecoderShape, blocks: int) -> int:
    shared, half = shape.num_heads // shape.num_kv_heads, shape.head_dim // 2
    threads = 32 * WARPS
    q_and_new = (shared + 2) * shape.head_dim
    outputs = max(1, threads // half) * shared * shape.head_dim
    per_head = shared * (KV_BLOCK_LIMIT + 3 + blocks // shape.num_kv_heads)
    return 4 * (q_and_new + outputs + per_head + 1)


def reason_against(shape: DecoderShape, fp8: Sequence[bool], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel can't run this decoder here; None: it can. fp8: of every matrix of the layers."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    if not shape.is_plain:
        return f"it knows no {' and no '.join(part.NOUN for part in shape.kinds if part.NOUN not in KNOWN)}"
    if dtype != torch.bfloat16:
        return f"needs bfloat16, this decoder has {dtype}"
    if any(fp8) != all(fp8):
        return "some matrices are FP8 and some are not"
    properties = torch.cuda.get_device_properties(device)
    blocks = properties.multi_processor_count
    memory = Memory.of(shape, is_fp8=all(fp8), blocks=blocks, limit=shared_bytes(device))
    if memory.stages < MIN_STAGES:
        return "a multiprocessor has too little shared memory"
    widths = (shape.hidden_size, shape.q_size, shape.intermediate_size)
    if any(width % 16 for width in widths):
        return f"widths {widths} are not multiples of 16"
    if shape.head_dim % 32 or 32 * WARPS % (shape.head_dim // 2):
        return f"head_dim {shape.head_dim} is not 64, 128 or 256"
    if shape.num_heads // shape.num_kv_heads > SHARED_HEADS_LIMIT or shape.num_kv_heads > blocks:
        return f"{shape.num_heads} query heads on {shape.num_kv_heads} key heads"
    if shape.hidden_size > 32 * WARPS * blocks:
        return f"hidden_size {shape.hidden_size} is more than {32 * WARPS * blocks}"
    return None


class PersistentDecode:
    """The kernel for one decoder and its caches: none of their tensors may move while it lives.

    Args:
        shape, weights, caches: in bfloat16, matrices all FP8 or none; of a model on several GPUs, this rank's part.
        peer_buffers: `persistent_buffer_bytes` each, for a model on several GPUs; all ranks make the same calls.
        blocks: None: one a multiprocessor. Tests run two kernels side by side with fewer.

    Raises:
        KernelError: the kernel can't be compiled or loaded.
    """

    def __init__(
        self,
        shape: DecoderShape,
        weights: DecoderWeights,
        caches: Caches,
        *,
        peer_buffers: PeerBuffers,
        blocks: int | None = None,
    ) -> None:
        device, head = weights.embedding.device, weights.head.weight
        is_fp8 = weights.layers[0].matrices[0].is_fp8
        self._blocks = blocks or torch.cuda.get_device_properties(device).multi_processor_count
        memory = Memory.of(shape, is_fp8=is_fp8, blocks=self._blocks, limit=shared_bytes(device))
        macros = {
            "HIDDEN": shape.hidden_size,
            "INTERMEDIATE": shape.intermediate_size,
            "HEADS": shape.num_heads,
            "KV_HEADS": shape.num_kv_heads,
            "HEAD_DIM": shape.head_dim,
            "VOCAB": len(head),
            "RANK": peer_buffers.rank,
            "RANKS": peer_buffers.size,
            "LAYERS": shape.num_layers,
            "MAX_SEQ_LEN": caches.extent,
            "PAGE": caches.page,
            "FP8": int(is_fp8),
            "QK_NORM": int(shape.qk_norm),
            "EPS": f"{shape.rms_norm_eps:.9e}f",
            "SCORE_SCALE": f"{shape.head_dim**-0.5 * math.log2(math.e):.9e}f",
            "BLOCKS": self._blocks,
            "STAGES": memory.stages,
            "IN_FLIGHT": memory.in_flight,
            "STAGE_BYTES": memory.stage_bytes,
            "KV_BLOCK": memory.kv_block,
            "SCRATCH_BYTES": memory.scratch_bytes,
        }
        self._kernel = Kernel(SOURCE.read_text("utf-8"), "persistent_decode", macros, shared_bytes=memory.total)
        self._held = weights, caches  # keeps alive what the table points to
        table = [
            address
            for index, layer in enumerate(weights.layers)
            for address in _addresses(layer, caches.keys[index], caches.values[index])
        ]
        layers = torch.tensor(table, dtype=torch.int64, device=device)
        work = torch.zeros(_work_bytes(shape, self._blocks) // 4, dtype=torch.int32, device=device)
        self._logits = torch.empty(1, len(head), dtype=torch.float32, device=device)
        self._arguments = [
            weights.embedding, weights.norm, head, weights.cos, weights.sin, layers,
            layers if caches.table is None else caches.table, work, peer_buffers.addresses,
            peer_buffers.given_up, self._logits,
        ]  # fmt: skip

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
        """As `Decoder.decode` for slot 0: logits [1, len(head)] float32, overwritten by the next call."""
        arguments = [ids, last_tokens, positions, *self._arguments]
        self._kernel.launch(self._blocks, 32 * (WARPS + 1), arguments)
        return self._logits


def _addresses(layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> list[int]:
    """Addresses of the layer's tensors in the order of the source's `Layer`; 0: no such tensor."""
    tensors = [layer.attention.norm, layer.mlp.norm, layer.attention.qk_norms]
    tensors += [tensor for linear in layer.matrices for tensor in (linear.weight, linear.scale, linear.bias)]
    return [0 if tensor is None else tensor.data_ptr() for tensor in [*tensors, keys, values]]


def persistent_buffer_bytes(shape: DecoderShape, num_ranks: int) -> int:
    """Bytes of a rank's buffer: two words of eight bytes for each rank and element of the hidden state."""
    return 2 * num_ranks * shape.hidden_size * 8


def _work_bytes(shape: DecoderShape, blocks: int) -> int:
    splits = blocks // shape.num_kv_heads
    qkv = shape.q_size + 2 * shape.kv_size
    partial = splits * shape.num_heads * (shape.head_dim + 2)
    sync = 3 + shape.num_kv_heads
    return 4 * (qkv + shape.q_size + shape.hidden_size + shape.intermediate_size + partial + sync)
