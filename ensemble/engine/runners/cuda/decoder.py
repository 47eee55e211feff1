"""The decoder's forward pass over its layers' parts; the caller owns inputs and caches.

It holds the weights, and knows nothing of requests, CUDA graphs or host memory. Every call only launches kernels: none
waits or depends on a value on the device, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import logging

import torch
import triton

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.part import Part
from deepseek_triton.ensemble.engine.runners.cuda.attention import Attention
from deepseek_triton.ensemble.engine.runners.cuda.buffers import Prompts
from deepseek_triton.ensemble.engine.runners.cuda.caches import Caches
from deepseek_triton.ensemble.engine.runners.cuda.decode_gemv import DecodeGemv
from deepseek_triton.ensemble.engine.runners.cuda.driver import KernelError
from deepseek_triton.ensemble.engine.runners.cuda.group import Group
from deepseek_triton.ensemble.engine.runners.cuda.kernels import rows
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.layers import DecoderWeights
from deepseek_triton.ensemble.engine.runners.cuda.linear import LinearOps, Parts, Rows
from deepseek_triton.ensemble.engine.runners.cuda.parts import PARTS
from deepseek_triton.ensemble.engine.runners.cuda.parts.part import DecodeStep, Pass, Tools
from deepseek_triton.ensemble.engine.runners.cuda.parts.residual import Residual
from deepseek_triton.ensemble.engine.runners.cuda.peer_buffers import PeerBuffers, RowPeerBuffers
from deepseek_triton.ensemble.engine.runners.cuda.persistent.kernel import (
    PersistentDecode,
    persistent_buffer_bytes,
    reason_against,
)
from deepseek_triton.ensemble.engine.runners.cuda.plan import KernelPlan
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightSource

log = logging.getLogger(__name__)


class Decoder:
    """A decoder on one device.

    Args:
        dtype: of embedding, head, cache and what isn't FP8: bfloat16; float32 for checks.
        pdl: let kernels start while their predecessors end (Hopper and later).
        group: for one of several tensor-parallel ranks; shape and source are then the rank's own.
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
        self.linear_ops = LinearOps(self.launch, plan, shape.rms_norm_eps, group)
        self.attention = Attention(self.launch, plan, shape, weights.cos, weights.sin)
        self._tools = Tools(self.linear_ops, shape, weights.cos, weights.sin)
        self.decode_gemv = DecodeGemv(self.launch, plan, shape.rms_norm_eps, group)
        self._persistent: PersistentDecode | None = None
        # Ranks of a model with experts add up their parts in the next norm: see `LinearOps.norm`.
        can_add = shape.is_plain or group is None
        self._has_gemv = bool(plan.gemv) and can_add and all(layer.has_gemv for layer in weights.layers)

    def decode(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        last_tokens: torch.Tensor,
        caches: Caches,
        finished_splits: torch.Tensor,
    ) -> torch.Tensor:
        """Run one token of each of slots 0 … n − 1: logits [n, vocab_size] float32.

        Args:
            ids: [n] int64; a negative one stands for the slot's entry in `last_tokens`.
            positions: [n] int64, where each token goes; negative: the row has no token, and its logits are undefined.
            finished_splits: [slots, kv_heads] int32 zeros, and zeros again afterwards.
        """
        if len(ids) == 1 and self._persistent is not None:
            return self._gather_logits(self._persistent(ids, positions, last_tokens))
        hidden = self._embed(ids, last_tokens)
        step = DecodeStep(positions, finished_splits, self.decode_gemv.attention_amax)
        if len(ids) == 1 and self._has_gemv:
            return self._decode_gemv(hidden, step, caches)
        passes = {part: PARTS[type(part)].decode(self._tools, part, step) for part in self.shape.kinds}
        return self._logits(self._states(self._run(hidden, passes, caches), None))

    def prepare(self, caches: Caches) -> None:
        """Compile the persistent kernel of batch 1 for these caches if it can run; else batch 1 uses the GEMV kernels.

        All ranks of a group call this together; they use the kernel only if all of them can.
        """
        weights, device, dtype = self.weights, self.launch.device, self.launch.dtype
        is_fp8 = [linear.is_fp8 for layer in weights.layers for linear in layer.matrices]
        peer_buffers = PeerBuffers.alone(device) if self._group is None else self._share_buffers(self._group)
        num_ranks = 1 if self._group is None else self._group.split.size
        reason = reason_against(self.shape, is_fp8, device, dtype, num_ranks)
        if caches.key_scales is not None:
            reason = "its cache is in INT8"
        if not self._has_gemv:
            reason = "batch 1 has no kernels of its own for this plan and these weights"
        if peer_buffers is None:
            reason = "the ranks have no peer access"
        elif self._agreed(reason is None):
            try:
                self._persistent = PersistentDecode(self.shape, weights, caches, peer_buffers=peer_buffers)
            except KernelError as error:
                log.warning("the persistent kernel doesn't run here, and batch 1 is slower for it: %s", error)
                reason = str(error)
            if not self._agreed(self._persistent is not None):
                self._persistent = None
        if self._persistent is None:
            log.info("batch 1 doesn't use the persistent kernel: %s", reason or "another rank can't")

    def _share_buffers(self, group: Group) -> PeerBuffers | None:
        """Allocate one buffer a rank: first the persistent kernel's part, then that of `LinearOps.norm`."""
        size, width = group.split.size, self.shape.hidden_size
        own = persistent_buffer_bytes(self.shape, size)
        peer_buffers = group.peer_buffers(own + RowPeerBuffers.num_bytes(size, width))
        if peer_buffers is not None and size > 1:
            self.linear_ops.row_peer_buffers = RowPeerBuffers.of(peer_buffers, own)
        return peer_buffers

    def _agreed(self, is_so: bool) -> bool:
        """Whether `is_so` on every rank."""
        return is_so if self._group is None else self._group.agreed(is_so)

    def has_whole_prompts(self, num_tokens: int) -> bool:
        """Whether a prefill of so many tokens is another one, and faster, where each chunk begins its text."""
        return self.shape.latent is not None and self.plan.use_library(num_tokens)

    def prefill(self, prompts: Prompts, caches: Caches) -> torch.Tensor:
        """Run several slots' packed chunks: logits [len(last_rows), vocab_size] float32 of their last tokens."""
        return self.prefill_states(prompts, caches)[1]

    def prefill_states(self, prompts: Prompts, caches: Caches) -> tuple[torch.Tensor, torch.Tensor]:
        """As `prefill`: the states [len(last_rows), hidden_size] after the last norm too, before the logits."""
        passes = {part: PARTS[type(part)].prefill(self._tools, part, prompts) for part in self.shape.kinds}
        states = self._states(self._run(self._embed(prompts.ids, None), passes, caches), prompts.last_rows)
        return states.values, self._logits(states)

    def _run(self, hidden: torch.Tensor, passes: dict[Part, Pass], caches: Caches) -> Residual:
        """The residual stream after all layers."""
        residual = Residual(hidden)
        for index, layer in enumerate(self.weights.layers):
            attention, mlp = self.shape.parts(index)
            passes[attention](residual, layer.attention, caches.layer(index))
            passes[mlp](residual, layer.mlp)
        return residual

    def _decode_gemv(self, hidden: torch.Tensor, step: DecodeStep, caches: Caches) -> torch.Tensor:
        gemv, weights = self.decode_gemv, self.weights
        passes = {part: PARTS[type(part)].gemv(gemv, self._tools, part, step) for part in self.shape.kinds}
        for index, layer in enumerate(weights.layers):
            attention, mlp = self.shape.parts(index)
            passes[attention](hidden, layer.attention, caches.layer(index))
            passes[mlp](hidden, layer.mlp)
        logits = self.launch.empty(1, len(weights.head.weight))
        gemv.norm_gemv(hidden, weights.norm, weights.head, logits, gemv.mlp_amax)
        return self._gather_logits(logits)

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

    def _states(self, residual: Residual, chosen: torch.Tensor | None) -> Rows:
        """The residual stream, or its `chosen` rows, after the last norm."""
        parts = residual.pending
        if chosen is not None and parts is not None:
            of_chosen = Parts(parts.tensor[:, chosen], parts.is_of_rank)
            parts = self.linear_ops.sum_over_ranks(of_chosen, of_experts=True) if parts.is_of_rank else of_chosen
        return self.linear_ops.norm(residual.hidden, parts, residual.bias, self.weights.norm, False, chosen)

    def _logits(self, states: Rows) -> torch.Tensor:
        return self._gather_logits(self.linear_ops.head(states, self.weights.head))

    def _gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """This rank's logits [rows, vocab_width] → all ranks' [rows, vocab_size]."""
        return logits if self._group is None else self._group.gather_logits(logits)
