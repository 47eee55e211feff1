"""The runner of a scoring engine on one GPU: rows in, log probabilities of their targets out.

It computes prompts as `CudaRunner` does, by one CUDA graph for each of a few dozen sizes, and reads logits at more
positions than the last. Rows aren't padded. The cache lives for one call of `score`; only the blocks of the tokens that
a template puts at the beginning of all prompts are computed at load and stay.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.cuda_memory import step_bytes
from deepseek_triton.ensemble.engine.runners.base import PromptChunk, RunnerError
from deepseek_triton.ensemble.engine.runners.cuda.buffers import Prompts
from deepseek_triton.ensemble.engine.runners.cuda.caches import PAGE
from deepseek_triton.ensemble.engine.runners.cuda.decoder import Decoder
from deepseek_triton.ensemble.engine.runners.cuda.device import (
    PDL_CAPABILITY,
    attributed,
    check_device,
    check_shape,
    new_stream,
    on_stream,
)
from deepseek_triton.ensemble.engine.runners.cuda.graphs import Captured, Capturer, PromptSizes
from deepseek_triton.ensemble.engine.runners.cuda.memory import MIB, blocks_that_fit, weight_bytes
from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm, TableChanges
from deepseek_triton.ensemble.engine.runners.cuda.plan import FAST, KernelPlan
from deepseek_triton.ensemble.engine.runners.cuda.scoring.log_probs import PassResults, read_positions
from deepseek_triton.ensemble.engine.runners.cuda.scoring.passes import (
    PassLimits,
    Prefix,
    ScoredSequence,
    plan_passes,
)
from deepseek_triton.ensemble.engine.runners.cuda.startup.compile_ahead import compile_ahead
from deepseek_triton.ensemble.engine.runners.cuda.startup.load_times import LoadTimes
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightSource
from deepseek_triton.ensemble.engine.runners.scoring import RowScores
from deepseek_triton.ensemble.scoring.rows import Ints, ScoreRow, make_row

log = logging.getLogger(__name__)

PAGES = CacheForm("pages")


class CudaScoringRunner:
    """Scores with what `builders/targets/artefacts/cuda_weights.py` writes. Implements `ScoringRunner`.

    Args:
        source: the weights.
        shape: the decoder's dimensions.
        max_pass_tokens: tokens of a pass; at least a row's `max_seq_len` are.
        prefix: token ids that most prompts begin with. Their whole blocks are computed once.
        device: a CUDA device; the CPU, for tests under Triton's interpreter, has no graphs.
        dtype: of what isn't FP8, and of the cache.

    Raises:
        RunnerError: the weights have other shapes, the GPU can't run them, or they don't fit into its memory.
    """

    def __init__(
        self,
        source: WeightSource,
        shape: DecoderShape,
        *,
        max_pass_tokens: int,
        prefix: Sequence[int] = (),
        plan: KernelPlan = FAST,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        check_shape(source, shape)
        self.vocab_size, self.max_seq_len = shape.vocab_size, shape.max_seq_len
        self._device = torch.device(device)
        if self._device.type == "cuda":
            check_device(source, self._device)
        shared = np.array(prefix[: len(prefix) // PAGE * PAGE], np.int32)
        self._limits = limits = PassLimits.of(max_pass_tokens, shape.max_seq_len, len(shared), PAGE)
        self._sizes = PromptSizes.of(limits.num_tokens, limits.num_logits)
        weights = weight_bytes(source.entries.values())
        self._check_fits(shape, weights, dtype)
        self._stream = new_stream(self._device)
        # By number of tokens, and whether each sequence begins its text.
        self._graphs: dict[tuple[int, bool], tuple[Captured, Prompts]] = {}
        times = LoadTimes()
        with on_stream(self._stream), attributed():
            pdl = self._stream is not None and torch.cuda.get_device_capability(self._device) >= PDL_CAPABILITY
            self._decoder = Decoder(shape, source, plan, self._device, dtype=dtype, pdl=pdl)
            times.ended("weights")
            self._caches = PAGES.allocate(shape, limits.num_logits, limits.num_blocks + 1, dtype, self._device)
            self._table_changes = TableChanges(self._caches.table)
            self._results = PassResults.empty(self._decoder.launch, limits.num_logits, shape)
            times.ended("caches")
            self._warm_up(times)
            self._prefix = self._compute_prefix(shared)
        zero = np.zeros(1, np.int32)
        self.score([make_row(zero, [zero])[0]])  # so that the first request isn't slower than the next
        cache = sum(tensor.nbytes for tensor in self._caches.tensors)
        log.info("loading took %s", times)
        log.info(
            "passes of up to %d tokens, prefix of %d; cache: %d MiB; weights: %d MiB; graphs: %s",
            limits.num_tokens, len(shared), cache // MIB, weights // MIB, sorted({size for size, _ in self._graphs}),
        )  # fmt: skip

    def score(self, rows: Sequence[ScoreRow], *, with_log_probs: bool = True) -> list[RowScores]:
        """See ScoringRunner. The head is little beside the layers: log probabilities are computed always."""
        log_probs = [np.zeros(len(row.target_ids), np.float32) for row in rows]
        hidden = [np.zeros(0, np.float32)] * len(rows)
        with on_stream(self._stream), attributed():
            for sequences in plan_passes(rows, self._prefix, self._limits):
                positions = read_positions(rows, sequences)
                self._compute(sequences)
                values, states = self._results.read(positions)
                for (row, target), value in zip(positions.targets, values, strict=True):
                    log_probs[row][target] = value
                for row, state in zip(positions.states, states, strict=True):
                    hidden[row] = state
        return [RowScores(*own) for own in zip(log_probs, hidden, strict=True)]

    def _compute(self, sequences: Sequence[ScoredSequence]) -> None:
        """Launch a pass; `self._results` gets the logits of its sequences, one behind the other."""
        chunks = []
        for slot, sequence in enumerate(sequences):
            self._table_changes.set(slot, 0, sequence.blocks)
            chunks.append(PromptChunk(slot, sequence.ids.astype(np.int64), sequence.start))
        self._table_changes.copy()
        starts = np.cumsum([0, *(len(sequence.ids) for sequence in sequences)])
        lines = np.concatenate([start + own.places for start, own in zip(starts[:-1], sequences, strict=True)])
        size = self._sizes.fitting_counts(int(starts[-1]), max(len(lines), len(sequences)))
        packed = self._sizes.pack(chunks, size)
        last_rows = np.zeros_like(packed.last_rows)
        last_rows[: len(lines)] = lines
        packed = replace(packed, last_rows=last_rows)
        are_whole = self._decoder.has_whole_prompts(size) and not any(sequence.start for sequence in sequences)
        if self._stream is None:
            self._run(Prompts.of(packed, self._device, are_whole=are_whole))
            return
        captured, prompts = self._graphs[size, are_whole]
        prompts.fill(packed)
        captured.replay(self._addresses())

    def _run(self, prompts: Prompts) -> torch.Tensor:
        states, logits = self._decoder.prefill_states(prompts, self._caches)
        return self._results.keep(states, logits)

    def _compute_prefix(self, ids: Ints) -> Prefix:
        """Compute the blocks of the prefix."""
        blocks = tuple(range(1, len(ids) // PAGE + 1))
        none = np.zeros(0, np.int32)
        if blocks:
            self._compute([ScoredSequence(0, ids, 0, blocks, none, none)])
        return Prefix(ids, blocks)

    def _check_fits(self, shape: DecoderShape, weights: int, dtype: torch.dtype) -> None:
        """Raise `RunnerError` if weights, cache and a pass are more than the GPU has free."""
        if self._device.type != "cuda":
            return
        limits = self._limits
        free, _ = torch.cuda.mem_get_info(self._device)
        steps = step_bytes(shape, limits.num_logits, limits.num_tokens)
        block_bytes = PAGES.block_bytes(shape, dtype.itemsize)
        most = limits.num_blocks
        if blocks_that_fit(weights, steps, block_bytes=block_bytes, free=free, most=most) < most:
            needed = (weights + steps + (most + 1) * block_bytes) // MIB
            raise RunnerError(
                f"passes of {limits.num_tokens} tokens need {needed} MiB with the weights, the GPU has "
                f"{free // MIB} MiB free; lower max_pass_tokens, or build with a smaller max_seq_len"
            )

    def _addresses(self) -> tuple[int, ...]:
        """Addresses of the tensors that graphs read and write."""
        return tuple(tensor.data_ptr() for tensor in (*self._caches.tensors, *self._results.tensors))

    def _warm_up(self, times: LoadTimes) -> None:
        """Compile every kernel and capture every graph: no request waits for it."""
        if self._stream is None:
            return
        nothing = [PromptChunk(0, np.zeros(1, np.int64), 0)]
        sizes = [
            (size, are_whole)
            for size in sorted(self._sizes.chunks, reverse=True)
            for are_whole in ((False, True) if self._decoder.has_whole_prompts(size) else (False,))
        ]
        prompts = [
            Prompts.of(self._sizes.pack(nothing, size), self._device, are_whole=are_whole) for size, are_whole in sizes
        ]
        runs = [partial(self._run, prompt) for prompt in prompts]
        with self._decoder.launch.recording() as launches:
            for run in runs:
                run()
        compile_ahead(launches)
        times.ended("Triton's kernels")
        captured = Capturer(self._stream, self._addresses).capture(runs)
        self._graphs = dict(zip(sizes, zip(captured, prompts, strict=True), strict=True))
        torch.cuda.synchronize(self._device)
        times.ended("graphs")
