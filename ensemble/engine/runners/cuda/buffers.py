"""Inputs and outputs of a step: page-locked host memory, and device memory at fixed addresses.

A decode step's inputs are one block of bytes, copied at once. The kernel that finds its results writes them to the
host's memory itself: a copy would begin after that kernel's end, and the next step after the copy's. The host has two
of each buffer, so that it can prepare a step while the previous one runs. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.runners.base import Decoded, DeviceSampling, Ids
from deepseek_triton.ensemble.engine.runners.cuda.prompts import PackedPrompts

STEPS_IN_FLIGHT = 2
NO_TOKEN = -1  # position of a row without a token
INPUTS: dict[str, torch.dtype] = {
    "ids": torch.int64, "positions": torch.int64, "seeds": torch.int64, "steps": torch.int64, "top_ks": torch.int32,
    "places": torch.int32, "temperatures": torch.float32, "top_ps": torch.float32, "min_ps": torch.float32,
}  # fmt: skip


class StepInputs:
    """One decode step's inputs: a tensor [rows] for each of `INPUTS`, views of one block of bytes."""

    def __init__(self, num_rows: int, device: torch.device, *, is_pinned: bool = False) -> None:
        size = num_rows * sum(dtype.itemsize for dtype in INPUTS.values())
        self.block = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=is_pinned)
        self.tensors: dict[str, torch.Tensor] = {}
        offset = 0
        for name, dtype in INPUTS.items():
            end = offset + num_rows * dtype.itemsize
            self.tensors[name] = self.block[offset:end].view(dtype)
            offset = end

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The tensors as NumPy arrays; for a block on the host."""
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


class StepResults:
    """Host memory for what steps of up to `num_rows` rows sample, which kernels write to.

    tokens [STEPS_IN_FLIGHT, num_rows] int64, log_probs likewise float32.
    """

    def __init__(self, num_rows: int, *, is_pinned: bool) -> None:
        size = (STEPS_IN_FLIGHT, num_rows)
        self.tokens = torch.zeros(size, dtype=torch.int64, pin_memory=is_pinned)
        self.log_probs = torch.zeros(size, dtype=torch.float32, pin_memory=is_pinned)

    def slots(self) -> list[StepSlot]:
        """A slot for each step in flight."""
        num_rows, is_pinned, host = self.tokens.shape[1], self.tokens.is_pinned(), torch.device("cpu")
        slots = []
        for index, (tokens, log_probs) in enumerate(zip(self.tokens, self.log_probs, strict=True)):
            inputs = StepInputs(num_rows, host, is_pinned=is_pinned)
            arrays = inputs.arrays()
            arrays["places"][:] = np.arange(index * num_rows, (index + 1) * num_rows)
            slots.append(StepSlot(inputs, arrays, tokens, log_probs))
        return slots


@dataclass
class StepSlot:
    """Host memory of one decode step: its inputs, and its part of `StepResults`."""

    inputs: StepInputs
    arrays: dict[str, NDArray[np.generic]]
    tokens: torch.Tensor  # [rows] int64
    log_probs: torch.Tensor  # [rows] float32
    logits: torch.Tensor | None = None  # [k, vocab_size] float32, allocated on first use

    def fill(self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], size: int) -> None:
        """Set rows 0 … size − 1; rows after those of `ids` have no token. A row without sampling is greedy."""
        n = len(ids)
        self.arrays["ids"][:n], self.arrays["positions"][:n] = ids, positions
        self.arrays["ids"][n:size], self.arrays["positions"][n:size] = 0, NO_TOKEN
        self.arrays["temperatures"][:size] = 0.0
        for row, sampling in enumerate(samplings):
            if sampling is not None and sampling.temperature > 0:
                values = (
                    sampling.temperature,
                    sampling.top_k,
                    sampling.top_p,
                    sampling.min_p,
                    _signed(sampling.seed),
                    sampling.step,
                )
                names = ("temperatures", "top_ks", "top_ps", "min_ps", "seeds", "steps")
                for name, value in zip(names, values, strict=True):
                    self.arrays[name][row] = value

    def logits_rows(self, count: int, vocab_size: int) -> torch.Tensor:
        """Host memory for `count` rows of logits."""
        if self.logits is None or len(self.logits) < count:
            self.logits = torch.empty(count, vocab_size, dtype=torch.float32, pin_memory=self.tokens.is_pinned())
        return self.logits[:count]


@dataclass(frozen=True)
class PendingStep:
    """A step in flight: the host memory of its results, and the event after them."""

    slot: StepSlot
    num_rows: int
    logits: torch.Tensor
    done: torch.cuda.Event | None  # None: the results are there already

    @classmethod
    def fetch(
        cls,
        slot: StepSlot,
        n: int,
        logits: torch.Tensor,
        logits_rows: Sequence[int],
    ) -> PendingStep:
        """Start copying `logits_rows` of the logits to the host's `slot`, where n tokens are written."""
        target = slot.logits_rows(len(logits_rows), logits.shape[1])
        for index, row in enumerate(logits_rows):
            target[index].copy_(logits[row], non_blocking=True)
        done = None
        if logits.is_cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return cls(slot, n, target, done)

    def wait(self) -> Decoded:
        """Wait for the results."""
        if self.done is not None:
            self.done.synchronize()
        tokens, log_probs = self.slot.tokens[: self.num_rows], self.slot.log_probs[: self.num_rows]
        return Decoded(tokens.numpy(), log_probs.numpy(), self.logits.numpy())


@dataclass(frozen=True)
class Prompts:
    """`PackedPrompts` on the device, field by field. are_whole: each chunk begins its text."""

    ids: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    tiles: torch.Tensor
    last_rows: torch.Tensor
    are_whole: bool = False

    @classmethod
    def of(cls, packed: PackedPrompts, device: torch.device, *, are_whole: bool = False) -> Prompts:
        """New tensors on `device`; doesn't wait for the copies."""
        tensors = {
            field.name: staged(getattr(packed, field.name), device).to(device, non_blocking=True)
            for field in fields(packed)
        }
        return cls(**tensors, are_whole=are_whole)

    def fill(self, packed: PackedPrompts) -> None:
        """Overwrite with prompts of the same sizes; doesn't wait for the copies."""
        for field in fields(packed):
            tensor = getattr(self, field.name)
            tensor.copy_(staged(getattr(packed, field.name), tensor.device), non_blocking=True)


def staged(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """`array` in page-locked memory, which torch keeps until an asynchronous copy to `device` is done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _signed(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 of the same bits."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed
