"""Which decoders have a persistent kernel here, its arguments and its launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.caches import Caches
from deepseek_triton.ensemble.engine.runners.cuda.launcher import shared_bytes
from deepseek_triton.ensemble.engine.runners.cuda.layers import DecoderWeights
from deepseek_triton.ensemble.engine.runners.cuda.nvrtc import Kernel
from deepseek_triton.ensemble.engine.runners.cuda.peer_buffers import PeerBuffers
from deepseek_triton.ensemble.engine.runners.cuda.persistent.dense import DenseFamily
from deepseek_triton.ensemble.engine.runners.cuda.persistent.family import INSTRUCTIONS, SOURCES, Family
from deepseek_triton.ensemble.engine.runners.cuda.persistent.latent import LatentFamily
from deepseek_triton.ensemble.engine.runners.cuda.persistent.memory import PRODUCER_WARPS, WARPS

CAPABILITY = (9, 0)
NAME = "persistent_decode"  # of every source's kernel


def family_of(shape: DecoderShape, *, is_fp8: bool, blocks: int, shared_limit: int) -> Family | None:
    """The family that `shape` belongs to; None: to none."""
    if shape.is_plain:
        return DenseFamily(shape, is_fp8, blocks, shared_limit)
    return None if shape.latent is None else LatentFamily(shape, is_fp8, blocks, shared_limit)


def reason_against(
    shape: DecoderShape, fp8: Sequence[bool], device: torch.device, dtype: torch.dtype, num_ranks: int = 1
) -> str | None:
    """Why no kernel can run this decoder here; None: one can. fp8: of every matrix of the layers."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    if dtype != torch.bfloat16:
        return f"needs bfloat16, this decoder has {dtype}"
    if any(fp8) != all(fp8):
        return "some matrices are FP8 and some are not"
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    family = family_of(shape, is_fp8=all(fp8), blocks=blocks, shared_limit=shared_bytes(device))
    if family is None:
        return f"it knows no {' with '.join(part.NOUN for part in shape.kinds)}"
    return family.reason_against(num_ranks)


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
        family = family_of(shape, is_fp8=is_fp8, blocks=self._blocks, shared_limit=shared_bytes(device))
        assert family is not None, "reason_against wasn't asked"
        macros = family.all_macros(
            vocab=len(head), extent=caches.extent, page=caches.page, rank=peer_buffers.rank, num_ranks=peer_buffers.size
        )
        instructions = (SOURCES / INSTRUCTIONS).read_text("utf-8")
        self._kernel = Kernel(family.source(instructions), NAME, macros, shared_bytes=family.memory.total)
        tensors = [
            tensor
            for index, layer in enumerate(weights.layers)
            for tensor in family.tensors(layer, caches.keys[index], caches.values[index])
        ]
        self._held = weights, caches, tensors  # keeps alive what the table points to
        table = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        layers = torch.tensor(table, dtype=torch.int64, device=device)
        work = torch.zeros(-(-family.work_bytes // 4), dtype=torch.int32, device=device)
        self._logits = torch.empty(1, len(head), dtype=torch.float32, device=device)
        self._arguments = [
            weights.embedding, weights.norm, head, weights.cos, weights.sin, layers,
            layers if caches.table is None else caches.table, work, peer_buffers.addresses,
            peer_buffers.given_up, self._logits,
        ]  # fmt: skip

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
        """As `Decoder.decode` for slot 0: logits [1, len(head)] float32, overwritten by the next call."""
        arguments = [ids, last_tokens, positions, *self._arguments]
        self._kernel.launch(self._blocks, 32 * (WARPS + PRODUCER_WARPS), arguments)
        return self._logits


def persistent_buffer_bytes(shape: DecoderShape, num_ranks: int) -> int:
    """Bytes of a rank's buffer: two words of eight bytes for each rank and element of the hidden state."""
    return 2 * num_ranks * shape.hidden_size * 8
