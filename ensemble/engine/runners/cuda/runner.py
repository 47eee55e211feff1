"""The CUDA runner: a decoder on one GPU, with torch and Triton's compiler.

Decode replays one CUDA graph for each batch size, sampling included; prefill one for each of a few dozen sizes. All GPU
memory is allocated when the model is loaded: a step allocates none. Everything runs in order on one stream, and the
host waits only for results. A step may be begun before the previous one's tokens are known: an id of −1 stands for
the token that the slot sampled last.

The file is long because it is one class: every method works on the same stream, buffers and captured graphs. What needs
none of these is in the modules beside it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.cuda_memory import step_bytes
from deepseek_triton.ensemble.engine.runners.base import (
    Decoded,
    DeviceSampling,
    Ids,
    Logits,
    PromptChunk,
    RunnerError,
)
from deepseek_triton.ensemble.engine.runners.cuda.buffers import (
    STEPS_IN_FLIGHT,
    PendingStep,
    Prompts,
    StepInputs,
    StepResults,
)
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
from deepseek_triton.ensemble.engine.runners.cuda.graphs import (
    Captured,
    Capturer,
    PromptSizes,
    captured_size,
    captured_sizes,
)
from deepseek_triton.ensemble.engine.runners.cuda.group import Group
from deepseek_triton.ensemble.engine.runners.cuda.limits import Limits
from deepseek_triton.ensemble.engine.runners.cuda.memory import MIB, blocks_that_fit, check_fits, weight_bytes
from deepseek_triton.ensemble.engine.runners.cuda.packing import PackingRunner
from deepseek_triton.ensemble.engine.runners.cuda.pages import SLOTS, CacheForm, TableChanges, describe_room
from deepseek_triton.ensemble.engine.runners.cuda.plan import FAST, INVARIANT, KernelPlan
from deepseek_triton.ensemble.engine.runners.cuda.sampling import FirstTokens, Scanned, sample_rows
from deepseek_triton.ensemble.engine.runners.cuda.startup.compile_ahead import compile_ahead
from deepseek_triton.ensemble.engine.runners.cuda.startup.load_times import LoadTimes
from deepseek_triton.ensemble.engine.runners.cuda.weights import SplitWeights, WeightSource

log = logging.getLogger(__name__)


class CudaRunner(PackingRunner):
    """Runs what `builders/targets/cuda_weights.py` writes. Implements `SamplingRunner` and `PipelinedRunner`.

    Args:
        source: the weights.
        shape: the decoder's dimensions.
        max_num_seqs: number of sequences that have a cache.
        max_num_batched_tokens: maximum number of tokens of one `prefill` or `prefill_many`.
        is_invariant: sum in one order for every batch size: a sequence's tokens don't depend on the others. Slower.
        cache_form: whole slots, or blocks. If those that fit hold less than `max_seq_len` positions, it is lowered.
        device: a CUDA device; the CPU, for tests under Triton's interpreter, has no graphs.
        dtype: of what isn't FP8, and of the caches.
        group: for one of several tensor-parallel ranks; all ranks must get the same calls.

    Raises:
        RunnerError: the weights have other shapes, the GPU can't run them, or they don't fit into its memory.
    """

    def __init__(
        self,
        source: WeightSource,
        shape: DecoderShape,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        is_invariant: bool = False,
        cache_form: CacheForm = SLOTS,
        plan: KernelPlan | None = None,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        group: Group | None = None,
    ) -> None:
        check_shape(source, shape)
        if reason := shape.reason_against_cache(cache_form.kind):
            raise RunnerError(reason)
        if group is not None:
            source, shape = SplitWeights(source, group.split), group.split.shape
        self.max_num_seqs, self.max_seq_len, self.vocab_size = max_num_seqs, shape.max_seq_len, shape.vocab_size
        self._prompt_sizes = PromptSizes.of(max_num_batched_tokens, max_num_seqs)
        self._shape, self._group = shape, group
        self._device = torch.device(device)
        self._is_cuda = self._device.type == "cuda"
        weights = weight_bytes(source.entries.values())
        if self._is_cuda:
            check_device(source, self._device)
        self._form = cache_form
        self.num_blocks = self._plan_blocks(weights, max_num_batched_tokens, dtype)
        self._stream = new_stream(self._device)
        self._graphs: dict[int, Captured] = {}
        # By number of tokens, and whether each chunk begins its text.
        self._prefill_graphs: dict[tuple[int, bool], tuple[Captured, Prompts]] = {}
        self._pending: deque[PendingStep] = deque()
        self._pending_prefills: deque[PendingStep] = deque()
        try:
            times = LoadTimes()
            with on_stream(self._stream):
                # No programmatic dependent launch with collectives: kernels wait for their predecessors' end.
                pdl = self._is_cuda and group is None and torch.cuda.get_device_capability(device) >= PDL_CAPABILITY
                chosen = plan or (INVARIANT if is_invariant else FAST)
                self._decoder = Decoder(shape, source, chosen, self._device, dtype=dtype, pdl=pdl, group=group)
                times.ended("weights")
                if group is not None:
                    group.join()
                    self.num_blocks = group.least(self.num_blocks) if cache_form.is_paged else 0
                if cache_form.is_paged and self.num_blocks * PAGE < self.max_seq_len:
                    self.max_seq_len = self.num_blocks * PAGE
                    log.warning("max_seq_len is lowered from %d to %d, which fit", shape.max_seq_len, self.max_seq_len)
                self._limits = Limits(max_num_seqs, self.max_seq_len, max_num_batched_tokens)
                self._allocate(dtype)
                times.ended("caches")
                self._decoder.prepare(self._caches)
                times.ended("persistent kernel")
                self._warm_up(times)
        except RunnerError:
            self.close()
            raise
        log.info("loading took %s", times)
        room = f"{max_num_seqs} slots x {self.max_seq_len} tokens"
        if cache_form.is_paged:
            room = describe_room(self.num_blocks * PAGE, self.max_seq_len, max_num_seqs)
        log.info(
            "KV cache: %s = %d MiB; weights: %d MiB; graphs: decode %s, prefill %s",
            room, self.cache_bytes // MIB, weights // MIB, sorted(self._graphs),
            sorted({size for size, _ in self._prefill_graphs}),
        )  # fmt: skip

    # ---- Runner

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """See Runner; not for a runner with blocks."""
        with on_stream(self._stream):
            for cache in self._caches.stored:
                cache[:, target, :, :num_tokens].copy_(cache[:, source, :, :num_tokens])

    def set_blocks(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """See PagedRunner."""
        self._table_changes.set(slot, first, blocks)

    def ends_within(self, seconds: float) -> bool:
        """Wait for all launched work, at most so many seconds; whether it ended."""
        deadline = time.monotonic() + seconds
        while self._stream is not None and not self._stream.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def close(self) -> None:
        """Free the weights, the caches and the graphs; a second call does nothing."""
        if self._stream is not None:
            self._stream.synchronize()
        self._graphs.clear()
        self._prefill_graphs.clear()
        self._pending.clear()
        self._pending_prefills.clear()
        for name in (
            "_decoder", "_caches", "_table_changes",
            "_inputs", "_tokens", "_results", "_finished_splits", "_slots", "_first_tokens",
            "_prompt_logits",
        ):  # fmt: skip
            self.__dict__.pop(name, None)
        if self._is_cuda:
            torch.cuda.empty_cache()
        if self._group is not None:
            self._group.leave()

    # ---- SamplingRunner

    def prefill_many(self, chunks: Sequence[PromptChunk]) -> Logits:
        """`prefill` of several slots' chunks at once: logits [len(chunks), vocab_size] of their last tokens."""
        self._limits.check_prefill(chunks)
        with on_stream(self._stream), attributed():
            logits: Logits = self._prefill(chunks)[: len(chunks)].to("cpu", copy=True).numpy()
        return logits

    def start_prefill(
        self, chunks: Sequence[PromptChunk], samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See PipelinedRunner."""
        self.check_start_prefill(chunks)
        with on_stream(self._stream), attributed():
            logits = self._prefill(chunks)
            slots = np.array([chunk.slot for chunk in chunks])
            self._pending_prefills.append(self._first_tokens.start(logits, slots, samplings, logits_rows, self._tokens))

    def finish_prefill(self) -> Decoded:
        """See PipelinedRunner."""
        if not self._pending_prefills:
            raise RunnerError("no prefill was begun")
        return self._pending_prefills.popleft().wait()

    def abandon(self) -> None:
        """See PipelinedRunner."""
        self._pending.clear()
        self._pending_prefills.clear()
        if self._stream is not None:
            self._stream.synchronize()

    def _prefill(self, chunks: Sequence[PromptChunk]) -> torch.Tensor:
        """Launch a prefill: logits [≥ len(chunks), vocab_size], which the next prefill overwrites."""
        size = self._prompt_sizes.fitting(chunks)
        packed = self._prompt_sizes.pack(chunks, size)
        self._table_changes.copy()
        are_whole = self._decoder.has_whole_prompts(size) and all(chunk.start == 0 for chunk in chunks)
        if not self._is_cuda:
            return self._prompt_step(Prompts.of(packed, self._device, are_whole=are_whole))
        captured, prompts = self._prefill_graphs[size, are_whole]
        prompts.fill(packed)
        return captured.replay(self._addresses())

    def _prompt_step(self, prompts: Prompts) -> torch.Tensor:
        logits = self._prompt_logits[: len(prompts.last_rows)]
        return logits.copy_(self._decoder.prefill(prompts, self._caches))

    def check_start_prefill(self, chunks: Sequence[PromptChunk]) -> None:
        """Check that `start_prefill` can begin this prefill.

        Raises:
            RunnerError: too many are in flight, or it exceeds the runner's limits.
        """
        if len(self._pending_prefills) == STEPS_IN_FLIGHT:
            raise RunnerError(f"{STEPS_IN_FLIGHT} prefills are in flight; finish one first")
        self._limits.check_prefill(chunks)

    def check_start_decode(self, ids: Ids, positions: Ids) -> None:
        """Check that `start_decode` can begin this step.

        Raises:
            RunnerError: too many are in flight, or it exceeds the runner's limits.
        """
        if len(self._pending) == STEPS_IN_FLIGHT:
            raise RunnerError(f"{STEPS_IN_FLIGHT} steps are in flight; finish one first")
        self._limits.check_decode(ids, positions)

    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See SamplingRunner; a second step may begin before the first is finished, ids −1 for the first's tokens."""
        self.check_start_decode(ids, positions)
        n = len(ids)
        size = captured_size(n, self.max_num_seqs)
        slot = self._slots[0]
        slot.fill(ids, positions, samplings, size)
        with on_stream(self._stream), attributed():
            self._table_changes.copy()
            self._inputs.block.copy_(slot.inputs.block, non_blocking=True)
            logits = self._run(size)
            self._pending.append(PendingStep.fetch(slot, n, logits, logits_rows))
        self._slots.rotate(-1)  # not if something failed: the other slot's step may be in flight

    def finish_decode(self) -> Decoded:
        """See SamplingRunner: the earliest step that was begun."""
        if not self._pending:
            raise RunnerError("no decode step was begun")
        return self._pending.popleft().wait()

    # ---- decode

    def _run(self, size: int) -> torch.Tensor:
        """Replay the graph of a step of `size` rows: logits [size, vocab_size]."""
        if not self._is_cuda:
            return self._step(size)
        return self._graphs[size].replay(self._addresses())

    def _step(self, size: int) -> torch.Tensor:
        inputs = {name: tensor[:size] for name, tensor in self._inputs.tensors.items()}
        logits = self._decoder.decode(
            inputs["ids"], inputs["positions"], self._tokens[:size], self._caches, self._finished_splits
        )
        scanned = Scanned.empty(self._decoder.launch, *logits.shape)
        sample_rows(self._decoder.launch, logits, inputs, scanned, self._tokens, self._results)
        return logits

    # ---- memory and graphs

    def _allocate(self, dtype: torch.dtype) -> None:
        shape, slots, device = self._shape, self.max_num_seqs, self._device
        extent = self.num_blocks + 1 if self._form.is_paged else shape.max_seq_len
        self._caches = self._form.allocate(shape, slots, extent, dtype, device)
        self._table_changes = TableChanges(self._caches.table)
        self.cache_bytes = sum(tensor.nbytes for tensor in self._caches.tensors)
        self._inputs = StepInputs(slots, device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._results = StepResults(slots, is_pinned=self._is_cuda)
        self._finished_splits = torch.zeros(slots, shape.num_kv_heads, dtype=torch.int32, device=device)
        self._slots = deque(self._results.slots())
        self._first_tokens = FirstTokens(self._decoder.launch, slots, shape.vocab_size, device)
        self._prompt_logits = torch.zeros(slots, shape.vocab_size, dtype=torch.float32, device=device)

    def _plan_blocks(self, weights: int, max_num_batched_tokens: int, dtype: torch.dtype) -> int:
        """How many blocks the cache will have, 0 for slots; checks that all fits."""
        shape, num_ranks = self._shape, 1 if self._group is None else self._group.split.size
        form, most = self._form, self._form.most_blocks(self.max_num_seqs, self.max_seq_len)
        if not self._is_cuda:
            return most if form.is_paged else 0
        free, _ = torch.cuda.mem_get_info(self._device)
        if form.is_paged:
            steps = step_bytes(shape, self.max_num_seqs, max_num_batched_tokens, num_ranks)
            return blocks_that_fit(
                weights, steps, block_bytes=form.block_bytes(shape, dtype.itemsize), free=free, most=most
            )
        check_fits(
            shape, weights,
            max_num_seqs=self.max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
            itemsize=dtype.itemsize, free=free, num_ranks=num_ranks,
        )  # fmt: skip
        return 0

    def _addresses(self) -> tuple[int, ...]:
        """Addresses of the tensors that graphs read and write."""
        tensors = (
            *self._caches.tensors, self._inputs.block, self._tokens, self._results.tokens, self._results.log_probs,
            self._finished_splits, self._prompt_logits,
        )  # fmt: skip
        return tuple(tensor.data_ptr() for tensor in tensors)

    def _warm_up(self, times: LoadTimes) -> None:
        """Compile every kernel and capture every graph: no request waits for it, and no step allocates memory."""
        if self._stream is None:
            return
        self._inputs.tensors["positions"].fill_(-1)
        nothing = [PromptChunk(0, np.zeros(1, np.int64), 0)]
        capturer = Capturer(self._stream, self._addresses, has_collectives=self._group is not None)
        with attributed():
            sizes = [
                (size, are_whole)
                for size in sorted(self._prompt_sizes.chunks, reverse=True)
                for are_whole in ((False, True) if self._decoder.has_whole_prompts(size) else (False,))
            ]
            prompts = [
                Prompts.of(self._prompt_sizes.pack(nothing, size), self._device, are_whole=are_whole)
                for size, are_whole in sizes
            ]
            batches = captured_sizes(self.max_num_seqs)[::-1]
            prefills = [partial(self._prompt_step, prompt) for prompt in prompts]
            runs = [*prefills, *(partial(self._step, batch) for batch in batches)]
            if self._group is None:  # ranks would exchange numbers that no kernel has written
                with self._decoder.launch.recording() as launches:
                    for run in runs:
                        run()
                compile_ahead(launches)
                launches.clear()  # the memory is the graphs'
            times.ended("Triton's kernels")
            captured = capturer.capture(runs)
            of_prompts, of_batches = captured[: len(sizes)], captured[len(sizes) :]
            self._prefill_graphs = dict(zip(sizes, zip(of_prompts, prompts, strict=True), strict=True))
            self._graphs = dict(zip(batches, of_batches, strict=True))
            first = self._first_tokens.start(self._prompt_logits, np.zeros(1, np.int64), [None], [], self._tokens)
            first.wait()
        torch.cuda.synchronize(self._device)
        times.ended("graphs")
