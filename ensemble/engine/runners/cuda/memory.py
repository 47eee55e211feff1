"""The memory check before loading: bytes needed against bytes free."""

from __future__ import annotations

from collections.abc import Iterable

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.cuda_memory import MIB as MIB
from deepseek_triton.ensemble.artefacts.cuda_memory import step_bytes
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry
from deepseek_triton.ensemble.engine.runners.base import RunnerError


def weight_bytes(entries: Iterable[TensorEntry]) -> int:
    """Bytes of all weights."""
    return sum(entry.num_bytes for entry in entries)


def check_fits(
    shape: DecoderShape,
    weights: int,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    itemsize: int,
    free: int,
    num_ranks: int = 1,
) -> None:
    """Raise if weights, caches and the largest step are more than `free` bytes.

    Args:
        shape, weights: this rank's own.
        num_ranks: tensor-parallel ranks.

    Raises:
        RunnerError: names what is needed, what is free, and the most slots, or tokens a slot, that would fit.
    """
    steps = step_bytes(shape, max_num_seqs, max_num_batched_tokens, num_ranks)
    cache = shape.cache_bytes(max_num_seqs, itemsize)
    if (needed := weights + steps + cache) <= free:
        return
    one_slot = shape.cache_bytes(1, itemsize)
    left = max(0, free - weights - steps)
    slots, tokens = left // one_slot, left // (shape.cache_bytes(max_num_seqs, itemsize) // shape.max_seq_len)
    needs = (
        f"{max_num_seqs} slots of {shape.max_seq_len} tokens need {_mib(needed)} MiB (weights {_mib(weights)}, cache "
        f"{_mib(cache)}, steps {_mib(steps)}), the GPU has {_mib(free)} MiB free"
    )
    if slots >= 1:
        raise RunnerError(
            f"{needs}; lower max_num_seqs to {slots}, or build with max_seq_len {tokens} to keep {max_num_seqs}; "
            f"a lower max_num_batched_tokens than {max_num_batched_tokens} needs less for steps"
        )
    raise RunnerError(
        f"{needs}; not even one slot fits: build with a smaller max_seq_len, or lower max_num_batched_tokens"
    )


def blocks_that_fit(weights: int, steps: int, *, block_bytes: int, free: int, most: int) -> int:
    """How many blocks of the cache, up to `most`, fit into `free` bytes beside weights and steps, and nobody's block.

    Raises:
        RunnerError: not one.
    """
    left = free - weights - steps
    if (count := min(left // block_bytes - 1, most)) < 1:
        raise RunnerError(
            f"weights {_mib(weights)} MiB and steps {_mib(steps)} MiB leave nothing for the cache, the GPU has "
            f"{_mib(free)} MiB free; lower max_num_batched_tokens or max_num_seqs"
        )
    return count


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // MIB)
