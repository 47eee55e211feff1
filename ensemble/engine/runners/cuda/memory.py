"""Does the model fit: bytes needed against bytes free, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry
from deepseek_triton.ensemble.engine.runners.base import RunnerError

MIB = 2**20
RESERVE = 512 * MIB  # the library's workspaces, kernels, and what the allocator can't hand out
COLLECTIVES = 512 * MIB  # NCCL's buffers


def weight_bytes(entries: Iterable[TensorEntry]) -> int:
    """Bytes of all weights."""
    return sum(entry.num_bytes for entry in entries)


def step_bytes(shape: DecoderShape, num_slots: int, prefill_chunk: int, num_ranks: int = 1) -> int:
    """About what the largest steps hold besides weights and caches."""
    widest = 2 * shape.intermediate_size + shape.intermediate_size + 6 * shape.hidden_size
    prefill = prefill_chunk * 4 * (widest + 2 * shape.q_size)
    logits = 5 * num_slots * shape.vocab_size * 4  # each decode graph has its own, some 3.5 times num_slots rows
    return prefill + logits + RESERVE + (COLLECTIVES + logits if num_ranks > 1 else 0)


def check_fits(
    shape: DecoderShape,
    weights: int,
    *,
    num_slots: int,
    prefill_chunk: int,
    itemsize: int,
    free: int,
    num_ranks: int = 1,
) -> None:
    """Raise if weights, caches and the largest step are more than `free` bytes.

    Args:
        shape, weights: this rank's own.
        num_ranks: of the model, which is split over so many GPUs.

    Raises:
        RunnerError: names what is needed, what is free, and the most slots, or tokens a slot, that would fit.
    """
    steps = step_bytes(shape, num_slots, prefill_chunk, num_ranks)
    cache = shape.cache_bytes(num_slots, itemsize)
    if (needed := weights + steps + cache) <= free:
        return
    one_slot = shape.cache_bytes(1, itemsize)
    left = max(0, free - weights - steps)
    slots, tokens = left // one_slot, left // (shape.cache_bytes(num_slots, itemsize) // shape.max_seq_len)
    needs = (
        f"{num_slots} slots of {shape.max_seq_len} tokens need {_mib(needed)} MiB (weights {_mib(weights)}, cache "
        f"{_mib(cache)}, steps {_mib(steps)}), the GPU has {_mib(free)} MiB free"
    )
    if slots >= 1:
        raise RunnerError(
            f"{needs}; lower num_slots to {slots}, or build with max_seq_len {tokens} to keep {num_slots}; a lower "
            f"prefill_chunk than {prefill_chunk} needs less for steps"
        )
    raise RunnerError(f"{needs}; not even one slot fits: build with a smaller max_seq_len, or lower prefill_chunk")


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // MIB)
