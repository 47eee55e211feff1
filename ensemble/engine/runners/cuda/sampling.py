"""Sampling on the GPU: the rows of a decode, and the first tokens after prompts. Calls only launch.

It knows neither the model nor requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton

from deepseek_triton.ensemble.engine.runners.base import DeviceSampling, Ids
from deepseek_triton.ensemble.engine.runners.cuda.buffers import PendingStep, StepInputs, StepResults
from deepseek_triton.ensemble.engine.runners.cuda.kernels import sampling
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher

SCAN_CHUNK = 4096  # logits that one program of scan_logits reads
SAMPLE_BLOCK = 4096


@dataclass(frozen=True)
class Scanned:
    """What scan_logits finds, each [≥ rows, vocabulary chunks]: largest logit, its token, sum of exponentials."""

    best: torch.Tensor
    where: torch.Tensor
    total: torch.Tensor

    @classmethod
    def empty(cls, launch: Launcher, num_rows: int, vocab_size: int) -> Scanned:
        """Uninitialised memory for `num_rows`."""
        chunks = int(triton.cdiv(vocab_size, SCAN_CHUNK))
        best, total = launch.empty(num_rows, chunks), launch.empty(num_rows, chunks)
        return cls(best, launch.empty(num_rows, chunks, dtype=torch.int32), total)


def scan(launch: Launcher, logits: torch.Tensor, scanned: Scanned) -> None:
    """Scan the rows of `logits` [n, vocab_size] into the first rows of `scanned`."""
    size, vocab_size = logits.shape
    chunks = scanned.best.shape[1]
    launch(
        sampling.scan_logits, (chunks, size), logits, scanned.best, scanned.where, scanned.total,
        V=vocab_size, CHUNK=SCAN_CHUNK, CHUNKS=chunks, num_warps=4,
    )  # fmt: skip


def sample_rows(
    launch: Launcher,
    logits: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    scanned: Scanned,
    tokens: torch.Tensor,
    results: StepResults,
) -> None:
    """Sample a token for each row of `logits` [n, vocab_size] into `tokens` [≥ n] and `results`; inputs: `INPUTS`."""
    size, vocab_size = logits.shape
    chunks = scanned.best.shape[1]
    best, where, total = scanned.best, scanned.where, scanned.total
    scan(launch, logits, scanned)
    launch(
        sampling.sample_tokens, (size,), logits, best, where, total,
        inputs["temperatures"], inputs["top_ks"], inputs["top_ps"], inputs["min_ps"], inputs["seeds"],
        inputs["steps"], tokens, inputs["places"], results.tokens, results.log_probs,
        V=vocab_size, CHUNKS=chunks, BLOCK_CHUNKS=triton.next_power_of_2(chunks), BLOCK=SAMPLE_BLOCK, num_warps=16,
    )  # fmt: skip


class FirstTokens:
    """Samples the first tokens after prompts. It has buffers of its own: a prefill may be in flight beside decodes."""

    def __init__(self, launch: Launcher, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._launch = launch
        self._scanned = Scanned.empty(launch, max_num_seqs, vocab_size)
        self._inputs = StepInputs(max_num_seqs, device)
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._results = StepResults(max_num_seqs, is_pinned=device.type == "cuda")
        self._slots = deque(self._results.slots())

    def start(
        self,
        logits: torch.Tensor,
        slots: Ids,
        samplings: Sequence[DeviceSampling | None],
        logits_rows: Sequence[int],
        last_tokens: torch.Tensor,
    ) -> PendingStep:
        """Start sampling from rows 0 … n − 1 of `logits` for `slots` [n].

        Args:
            last_tokens: [max_num_seqs]; the slots' entries become the sampled tokens, undefined without sampling.
        """
        n = len(slots)
        step = self._slots[0]
        step.fill(slots, slots, samplings, n)
        self._inputs.block.copy_(step.inputs.block, non_blocking=True)
        sample_rows(self._launch, logits[:n], self._inputs.tensors, self._scanned, self._tokens, self._results)
        last_tokens.index_copy_(0, self._inputs.tensors["ids"][:n], self._tokens[:n])
        pending = PendingStep.fetch(step, n, logits, logits_rows)
        self._slots.rotate(-1)  # not if something failed: the other slot's step may be in flight
        return pending
