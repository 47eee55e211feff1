"""Collectives of the tensor-parallel ranks: all-reduce of partial sums, all-gather of logits.

All ranks make the same calls in the same order. With NCCL a call only launches, so that it can be captured in a CUDA
graph; with gloo, on the CPU, it waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.engine.runners.cuda.driver import KernelError
from deepseek_triton.ensemble.engine.runners.cuda.peer_buffers import PeerBuffers, SharedBuffers

log = logging.getLogger(__name__)


class Group:
    """This process as one rank of `split`.

    Args:
        rendezvous: path of a file that doesn't exist yet, the same on all ranks.
        meet: called before connecting; returns when all ranks are about to connect.
        is_invariant: add in rank order, whatever the number of rows.
    """

    def __init__(
        self,
        split: ShardedDecoder,
        device: torch.device,
        rendezvous: Path,
        *,
        meet: Callable[[], None],
        timeout_s: float,
        is_invariant: bool = False,
    ) -> None:
        self.split = split
        self._device, self._rendezvous, self._meet = device, rendezvous, meet
        self._timeout = timedelta(seconds=timeout_s)
        self._is_invariant = is_invariant
        self._shared: SharedBuffers | None = None
        self._given_up: torch.Tensor | None = None

    def join(self) -> None:
        """Connect with the other ranks."""
        self._meet()
        is_cuda = self._device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            init_method=self._rendezvous.as_uri(),
            rank=self.split.rank,
            world_size=self.split.size,
            timeout=self._timeout,
            device_id=self._device if is_cuda else None,
        )

    def leave(self) -> None:
        """Disconnect; a second call does nothing."""
        try:
            if self._shared is not None:
                self._shared.close()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def free(self) -> None:
        """Free the memory that other ranks mapped, once they are gone; a second call does nothing."""
        if self._shared is not None:
            self._shared.free()
            self._shared = None

    def abort(self) -> None:
        """Disconnect from ranks that are gone: calls that wait for them, in any thread, return or fail."""
        if self._given_up is not None:
            self._given_up[0] = 1
        if dist.is_initialized() and self._device.type == "cuda":  # gloo fails by itself
            dist.distributed_c10d._abort_process_group()

    def agreed(self, is_so: bool) -> bool:
        """Whether `is_so` on every rank; waits for all of them."""
        answer = torch.tensor([is_so], dtype=torch.int32, device=self._device)
        dist.all_reduce(answer, dist.ReduceOp.MIN)
        return bool(answer.item())

    def least(self, number: int) -> int:
        """The least `number` of all ranks; waits for all of them."""
        answer = torch.tensor([number], dtype=torch.int64, device=self._device)
        dist.all_reduce(answer, dist.ReduceOp.MIN)
        return int(answer.item())

    def peer_buffers(self, num_bytes: int) -> PeerBuffers | None:
        """Buffers of `num_bytes` on every rank, mapped by all ranks until `leave`; None: there is no peer access."""
        if self._device.type != "cuda":
            return None
        self._given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._shared = SharedBuffers(num_bytes, self._device)
        handles, peer_buffers = self._gather(self._shared.handle[None])[:, 0], None
        try:
            addresses = self._shared.open(self.split.rank, handles)
            peer_buffers = PeerBuffers(self.split.rank, self.split.size, addresses, self._given_up)
        except KernelError as error:
            log.warning("rank %d has no peer access to the other GPUs: %s", self.split.rank, error)
        return peer_buffers if self.agreed(peer_buffers is not None) else None

    def add(self, part: torch.Tensor) -> None:
        """All-reduce `part` in place; every rank gets the same bits."""
        if self._is_invariant and self.split.size > 2:  # two numbers have the same sum in either order
            part.copy_(_in_order(self._gather(part)))
        else:
            dist.all_reduce(part)

    def sum_parts(self, parts: torch.Tensor) -> torch.Tensor:
        """Partial sums [n, rows, out] → the sum [rows, out] over all ranks; overwrites `parts`."""
        total = _in_order(parts) if self._is_invariant or len(parts) == 1 else parts.sum(0)
        self.add(total)
        return total

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """All ranks' logits [rows, vocab_width] → [rows, vocab_size], in vocabulary order."""
        joined = self._gather(logits).transpose(0, 1).reshape(len(logits), -1)
        return joined[:, : self.split.whole.vocab_size].contiguous()

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-gather: [size, *tensor.shape]."""
        size, tensor = self.split.size, tensor.contiguous()
        gathered = tensor.new_empty((size * len(tensor), *tensor.shape[1:]))
        # torch 2.13 renames all_gather_into_tensor
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, tensor)
        return gathered.view(size, *tensor.shape)


def _in_order(parts: torch.Tensor) -> torch.Tensor:
    """The sum of `parts` [n, …] in order, in place of the first."""
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total
