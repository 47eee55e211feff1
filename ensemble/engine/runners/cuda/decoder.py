"""The decoder's forward pass: kernels in order, over tensors that its caller owns.

It holds the weights; it knows nothing of slots' owners, graphs or the host. Every function only launches: nothing
waits, and nothing depends on a value on the device, so that a call can be captured.
"""

from __future__ import annotations

import logging

import torch
import triton

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.attention import Attention, Caches
from deepseek_triton.ensemble.engine.runners.cuda.buffers import Prompts
from deepseek_triton.ensemble.engine.runners.cuda.decode_gemv import DecodeGemv
from deepseek_triton.ensemble.engine.runners.cuda.driver import KernelError
from deepseek_triton.ensemble.engine.runners.cuda.group import Group
from deepseek_triton.ensemble.engine.runners.cuda.kernels import rows
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.layers import DecoderWeights, Layer
from deepseek_triton.ensemble.engine.runners.cuda.linear import LinearOps, Parts
from deepseek_triton.ensemble.engine.runners.cuda.peer_buffers import MOST_ROWS, PeerBuffers, RowPeerBuffers
from deepseek_triton.ensemble.engine.runners.cuda.persistent_decode import (
    PersistentDecode,
    peer_buffer_bytes,
    reason_against,
)
from deepseek_triton.ensemble.engine.runners.cuda.plan import KernelPlan
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightSource

log = logging.getLogger(__name__)


class Decoder:
    """A decoder on one device.

    Args:
        dtype: of embedding, head, cache and whatever isn't FP8: bfloat16; float32 for checks.
        pdl: let kernels start while their predecessors end (Hopper and later).
        group: where this is one rank of several; shape and source are then its own part's.
    """

    def __init__(
        self,
        shape: DecoderShape,
        source: WeightSource,
        plan: KernelPlan,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.bfloat16,
        pdl: bool = True,
        group: Group | None = None,
    ) -> None:
        self.shape, self.plan, self._group = shape, plan, group
        split = None if group is None else group.split
        self.weights = weights = DecoderWeights.load(shape, source, device, dtype, split)
        self.launch = Launcher(device, dtype, pdl=pdl)
        self.linear_ops = LinearOps(self.launch, plan, shape.rms_norm_eps)
        self.attention = Attention(self.launch, plan, shape, weights.cos, weights.sin)
        self.decode_gemv = DecodeGemv(self.launch, plan, shape, weights, self.attention, group)
        self._one: PersistentDecode | None = None

    def decode(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        last_tokens: torch.Tensor,
        caches: Caches,
        arrived: torch.Tensor,
    ) -> torch.Tensor:
        """One token for slots 0 … n − 1: logits [n, vocab_size] float32.

        Args:
            ids: [n] int64; a negative one stands for the slot's entry in `last_tokens`.
            positions: [n] int64, where each token goes; negative: the row has none, and its logits mean nothing.
            arrived: [slots, kv_heads] int32 zeros, and zeros again afterwards.
        """
        if len(ids) == 1 and self._one is not None:
            return self._joined(self._one(ids, positions, last_tokens))
        hidden = self._embed(ids, last_tokens)
        if len(ids) == 1 and self.plan.gemv:
            return self._joined(self.decode_gemv(hidden, positions, caches, arrived))
        return self._decode_many(hidden, positions, caches, arrived)

    def prepare(self, caches: Caches) -> None:
        """Compile the single kernel of batch 1 for these caches, if it can run here; else batch 1 takes several.

        The ranks of a group call it together, and none has the kernel unless all have.
        """
        weights, device, dtype = self.weights, self.launch.device, self.launch.dtype
        is_fp8 = [linear.is_fp8 for layer in weights.layers for linear in layer.matrices]
        peer_buffers = PeerBuffers.alone(device) if self._group is None else self._share_boxes(self._group)
        reason = reason_against(self.shape, is_fp8, device, dtype)
        if not self.plan.gemv:
            reason = "the plan has no kernels for one row"
        if peer_buffers is None:
            reason = "the ranks share no memory"
        elif self._agreed(reason is None):
            try:
                self._one = PersistentDecode(self.shape, weights, caches, peer_buffers=peer_buffers)
            except KernelError as error:
                reason = str(error)
            if not self._agreed(self._one is not None):
                self._one = None
        if self._one is None:
            log.info("batch 1 runs by several kernels: %s", reason or "another rank can't do otherwise")

    def _share_boxes(self, group: Group) -> PeerBuffers | None:
        """One box a rank: the single kernel's words, then those of rows."""
        size, width = group.split.size, self.shape.hidden_size
        own = peer_buffer_bytes(self.shape, size)
        peer_buffers = group.peer_buffers(own + RowPeerBuffers.num_bytes(size, width))
        if peer_buffers is not None and size > 1:
            self.linear_ops.row_peer_buffers = RowPeerBuffers.of(peer_buffers, own)
        return peer_buffers

    def _agreed(self, is_so: bool) -> bool:
        """Whether it is so on every rank."""
        return is_so if self._group is None else self._group.agreed(is_so)

    def prefill(self, prompts: Prompts, caches: Caches) -> torch.Tensor:
        """Several slots' chunks, packed: logits [len(last_rows), vocab_size] float32 of their last tokens."""
        linear_ops, attention = self.linear_ops, self.attention
        hidden = self._embed(prompts.ids, None)
        q = self.launch.empty(len(hidden), self.shape.q_size, dtype=self.launch.dtype)
        attended = torch.empty_like(q)
        parts: Parts | None = None
        bias: torch.Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            keys, values = caches.keys[index], caches.values[index]
            normed = linear_ops.norm(hidden, parts, bias, layer.attention_norm, layer.qkv.is_fp8)
            projected = linear_ops.multiply(normed, layer.qkv)
            attention.rope(projected, layer, prompts.slots, prompts.positions, q, keys, values)
            attention.prefill(q, keys, values, prompts.tiles, attended)
            parts, bias = self._rest_of_layer(hidden, attended, layer)
        return self._logits(hidden, parts, bias, prompts.last_rows)

    def _decode_many(
        self, hidden: torch.Tensor, positions: torch.Tensor, caches: Caches, arrived: torch.Tensor
    ) -> torch.Tensor:
        attended = self.launch.empty(len(hidden), self.shape.q_size)
        parts: Parts | None = None
        bias: torch.Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            normed = self.linear_ops.norm(hidden, parts, bias, layer.attention_norm, layer.qkv.is_fp8)
            qkv = self.linear_ops.multiply(normed, layer.qkv)
            self.attention.decode(
                qkv, layer.qkv.bias, layer, positions, caches.keys[index], caches.values[index], arrived, attended,
                self.decode_gemv.attention_amax,
            )  # fmt: skip
            parts, bias = self._rest_of_layer(hidden, attended, layer)
        return self._logits(hidden, parts, bias, None)

    def _embed(self, ids: torch.Tensor, last_tokens: torch.Tensor | None) -> torch.Tensor:
        width = self.shape.hidden_size
        hidden = self.launch.empty(len(ids), width)
        block = min(1024, triton.next_power_of_2(width))
        self.launch(
            rows.embed_rows, (len(ids), triton.cdiv(width, block)),
            ids, ids if last_tokens is None else last_tokens, self.weights.embedding, hidden,
            self.decode_gemv.attention_amax,
            H=width, BLOCK=block, HAS_LAST=last_tokens is not None, num_warps=4,
        )  # fmt: skip
        return hidden

    def _rest_of_layer(
        self, hidden: torch.Tensor, attended: torch.Tensor, layer: Layer
    ) -> tuple[Parts, torch.Tensor | None]:
        """From attention's output to what the next layer adds to `hidden`: parts, and a bias."""
        linear_ops = self.linear_ops
        output = self._summed(linear_ops.multiply(linear_ops.quantise(attended, layer.o), layer.o))
        normed = linear_ops.norm(hidden, output, layer.o.bias, layer.mlp_norm, layer.gate_up.is_fp8)
        product = linear_ops.silu(linear_ops.multiply(normed, layer.gate_up), layer)
        return self._summed(linear_ops.multiply(product, layer.down)), layer.down.bias

    def _logits(
        self, hidden: torch.Tensor, parts: Parts | None, bias: torch.Tensor | None, chosen: torch.Tensor | None
    ) -> torch.Tensor:
        if chosen is not None and parts is not None:
            of_chosen = Parts(parts.tensor[:, chosen], parts.is_of_rank)
            parts = self._summed(of_chosen) if parts.is_of_rank else of_chosen
        normed = self.linear_ops.norm(hidden, parts, bias, self.weights.norm, False, chosen)
        return self._joined(self.linear_ops.head(normed, self.weights.head))

    def _summed(self, parts: Parts) -> Parts:
        """A product of this rank's columns → of all ranks', or, of few rows, what the norm that reads it sums up."""
        if self._group is None:
            return parts
        if self.linear_ops.row_peer_buffers.peer_buffers.size > 1 and parts.tensor.shape[1] <= MOST_ROWS:
            return Parts(parts.tensor, is_of_rank=True)
        return Parts(self._group.sum_parts(parts.tensor)[None])

    def _joined(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's tokens → of the vocabulary."""
        return logits if self._group is None else self._group.gather_logits(logits)
