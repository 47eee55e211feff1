"""The CUDA runner: a decoder on one GPU, in torch and Triton's compiler alone.

Decoding replays one CUDA graph for each batch size, sampling included, prefill one for each of a few dozen sizes. What
they need they took when the model was loaded: a step takes no memory of the GPU. Everything runs on one stream, in
order; the host waits for results only. A step may be begun before the last one's tokens are known: an id of −1 stands
for the token that the slot drew last.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError
from deepseek_triton.ensemble.engine.runners.base import (
    Decoded,
    DeviceSampling,
    Ids,
    Logits,
    OutOfMemoryError,
    PromptChunk,
    RunnerError,
)
from deepseek_triton.ensemble.engine.runners.cuda.attention import Caches
from deepseek_triton.ensemble.engine.runners.cuda.buffers import (
    STEPS_IN_FLIGHT,
    PendingStep,
    Prompts,
    StepInputs,
    StepSlot,
)
from deepseek_triton.ensemble.engine.runners.cuda.decoder import Decoder
from deepseek_triton.ensemble.engine.runners.cuda.graphs import (
    Captured,
    Capturer,
    PromptSizes,
    captured_size,
    captured_sizes,
)
from deepseek_triton.ensemble.engine.runners.cuda.group import Group
from deepseek_triton.ensemble.engine.runners.cuda.limits import Limits
from deepseek_triton.ensemble.engine.runners.cuda.memory import MIB, check_fits, weight_bytes
from deepseek_triton.ensemble.engine.runners.cuda.packing import PackingRunner
from deepseek_triton.ensemble.engine.runners.cuda.plan import FAST, INVARIANT, KernelPlan
from deepseek_triton.ensemble.engine.runners.cuda.sampling import FirstTokens, Scanned, sample_rows
from deepseek_triton.ensemble.engine.runners.cuda.weights import SplitWeights, WeightSource

log = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)
PDL_CAPABILITY = (9, 0)


class CudaRunner(PackingRunner):
    """Runs what `builders/targets/cuda_weights.py` writes. Implements `SamplingRunner` and `PipelinedRunner`.

    Args:
        source: the weights.
        shape: the decoder's dimensions.
        max_num_seqs: how many sequences have a cache at once.
        max_num_batched_tokens: the most tokens that `prefill` and `prefill_many` will be given at once.
        is_invariant: sums in one order for every batch: a sequence's tokens don't depend on its neighbours. Slower.
        device: a CUDA device; the CPU, for tests under Triton's interpreter, has no graphs.
        dtype: of what isn't FP8, the caches among it; None: bfloat16.
        group: where this is one rank of several; the others must be given the same calls.

    Raises:
        RunnerError: the weights aren't this shape's, the GPU can't run them, or they don't fit into its memory.
    """

    def __init__(
        self,
        source: WeightSource,
        shape: DecoderShape,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        is_invariant: bool = False,
        plan: KernelPlan | None = None,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        group: Group | None = None,
    ) -> None:
        try:
            shape.check(source.entries)
        except LayoutError as error:
            raise RunnerError(f"{error}; build the model again") from error
        if group is not None:
            source, shape = SplitWeights(source, group.split), group.split.shape
        self.max_num_seqs, self.max_seq_len, self.vocab_size = max_num_seqs, shape.max_seq_len, shape.vocab_size
        self._limits = Limits(max_num_seqs, shape.max_seq_len, max_num_batched_tokens)
        self._prompt_sizes = PromptSizes.of(max_num_batched_tokens, max_num_seqs)
        self._shape, self._group = shape, group
        self._device = torch.device(device)
        self._is_cuda = self._device.type == "cuda"
        weights = weight_bytes(source.entries.values())
        if self._is_cuda:
            if not torch.cuda.is_available():
                raise RunnerError("torch sees no NVIDIA GPU here; serve this model where there is one")
            _check_device(source, self._device)
            free, _ = torch.cuda.mem_get_info(self._device)
            check_fits(
                shape, weights,
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
                itemsize=dtype.itemsize, free=free,
                num_ranks=1 if group is None else group.split.size,
            )  # fmt: skip
        self._stream: torch.cuda.Stream | None = None
        if self._is_cuda:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._graphs: dict[int, Captured] = {}
        self._prefill_graphs: dict[int, tuple[Captured, Prompts]] = {}
        self._pending: deque[PendingStep] = deque()
        self._pending_prefills: deque[PendingStep] = deque()
        try:
            with self._on_stream():
                # Between collectives kernels wait for their predecessors' end.
                pdl = self._is_cuda and group is None and torch.cuda.get_device_capability(device) >= PDL_CAPABILITY
                chosen = plan or (INVARIANT if is_invariant else FAST)
                self._decoder = Decoder(shape, source, chosen, self._device, dtype=dtype, pdl=pdl, group=group)
                self._allocate(dtype)
                if group is not None:
                    group.join()
                self._decoder.prepare(self._caches)
                self._warm_up()
        except RunnerError:
            self.close()
            raise
        log.info(
            "KV cache: %d slots x %d tokens = %d MiB; weights: %d MiB; graphs: decode %s, prefill %s",
            max_num_seqs, self.max_seq_len, self.cache_bytes // MIB, weights // MIB,
            sorted(self._graphs), sorted(self._prefill_graphs),
        )  # fmt: skip

    # ---- Runner

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """See Runner."""
        with self._on_stream():
            for cache in (self._caches.keys, self._caches.values):
                cache[:, target, :, :num_tokens].copy_(cache[:, source, :, :num_tokens])

    def ends_within(self, seconds: float) -> bool:
        """Whether everything that was begun ends in so many seconds."""
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
            "_decoder", "_caches", "_inputs", "_tokens", "_log_probs", "_arrived", "_slots", "_first_tokens",
            "_prompt_logits",
        ):  # fmt: skip
            self.__dict__.pop(name, None)
        if self._is_cuda:
            torch.cuda.empty_cache()
        if self._group is not None:
            self._group.leave()

    # ---- SamplingRunner

    def prefill_many(self, chunks: Sequence[PromptChunk]) -> Logits:
        """`prefill` of several slots' chunks at once: the logits [len(chunks), vocab_size] of each one's last token."""
        self._limits.check_prefill(chunks)
        with self._on_stream(), self._attributed():
            logits: Logits = self._prefill(chunks)[: len(chunks)].to("cpu", copy=True).numpy()
        return logits

    def start_prefill(
        self, chunks: Sequence[PromptChunk], samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See PipelinedRunner."""
        self.check_start_prefill(chunks)
        with self._on_stream(), self._attributed():
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
        """Launch a prefill: logits [len(chunks) or more, vocab_size], which the next overwrites."""
        size = self._prompt_sizes.fitting(chunks)
        packed = self._prompt_sizes.pack(chunks, size)
        if not self._is_cuda:
            return self._prompt_step(Prompts.of(packed, self._device))
        captured, prompts = self._prefill_graphs[size]
        prompts.fill(packed)
        return captured.replay(self._addresses())

    def _prompt_step(self, prompts: Prompts) -> torch.Tensor:
        logits = self._prompt_logits[: len(prompts.last_rows)]
        return logits.copy_(self._decoder.prefill(prompts, self._caches))

    def check_start_prefill(self, chunks: Sequence[PromptChunk]) -> None:
        """Can `start_prefill` begin one?

        Raises:
            RunnerError: too many are in flight, or it is more than this runner was made for.
        """
        if len(self._pending_prefills) == STEPS_IN_FLIGHT:
            raise RunnerError(f"{STEPS_IN_FLIGHT} prefills are in flight; finish one first")
        self._limits.check_prefill(chunks)

    def check_start_decode(self, ids: Ids, positions: Ids) -> None:
        """Can `start_decode` begin one?

        Raises:
            RunnerError: too many are in flight, or it is more than this runner was made for.
        """
        if len(self._pending) == STEPS_IN_FLIGHT:
            raise RunnerError(f"{STEPS_IN_FLIGHT} steps are in flight; finish one first")
        self._limits.check_decode(ids, positions)

    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See SamplingRunner; a second step may be begun before the first is finished, ids −1 its tokens."""
        self.check_start_decode(ids, positions)
        n = len(ids)
        size = captured_size(n, self.max_num_seqs)
        slot = self._slots[0]
        self._slots.rotate(-1)
        slot.fill(ids, positions, samplings, size)
        with self._on_stream(), self._attributed():
            self._inputs.block.copy_(slot.inputs.block, non_blocking=True)
            logits = self._run(size)
            self._pending.append(PendingStep.fetch(slot, self._tokens[:n], self._log_probs[:n], logits, logits_rows))

    def finish_decode(self) -> Decoded:
        """See SamplingRunner: the earliest step that was begun."""
        if not self._pending:
            raise RunnerError("no decode step was begun")
        return self._pending.popleft().wait()

    # ---- decode

    def _run(self, size: int) -> torch.Tensor:
        """The step of `size` rows, by its graph: logits [size, vocab_size]."""
        if not self._is_cuda:
            return self._step(size)
        return self._graphs[size].replay(self._addresses())

    def _step(self, size: int) -> torch.Tensor:
        inputs = {name: tensor[:size] for name, tensor in self._inputs.tensors.items()}
        logits = self._decoder.decode(
            inputs["ids"], inputs["positions"], self._tokens[:size], self._caches, self._arrived
        )
        scanned = Scanned.empty(self._decoder.launch, *logits.shape)
        sample_rows(self._decoder.launch, logits, inputs, scanned, self._tokens, self._log_probs)
        return logits

    # ---- memory and graphs

    def _allocate(self, dtype: torch.dtype) -> None:
        shape, slots, device = self._shape, self.max_num_seqs, self._device
        size = (shape.num_layers, slots, shape.num_kv_heads, shape.max_seq_len, shape.head_dim)
        # Zeros, not empty: a masked position is multiplied by 0, and 0 x NaN is NaN.
        self._caches = Caches(*(torch.zeros(size, dtype=dtype, device=device) for _ in range(2)))
        self.cache_bytes = shape.cache_bytes(slots, dtype.itemsize)
        self._inputs = StepInputs(slots, device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(slots, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(slots, shape.num_kv_heads, dtype=torch.int32, device=device)
        self._slots = deque(StepSlot.make(slots, is_pinned=self._is_cuda) for _ in range(STEPS_IN_FLIGHT))
        self._first_tokens = FirstTokens(self._decoder.launch, slots, shape.vocab_size, device)
        self._prompt_logits = torch.zeros(slots, shape.vocab_size, dtype=torch.float32, device=device)

    def _addresses(self) -> tuple[int, ...]:
        """Where a graph finds what outlives it."""
        tensors = (
            self._caches.keys, self._caches.values, self._inputs.block, self._tokens, self._log_probs, self._arrived,
            self._prompt_logits,
        )  # fmt: skip
        return tuple(tensor.data_ptr() for tensor in tensors)

    def _warm_up(self) -> None:
        """Compile every kernel and capture every graph: no request waits for it, and no step takes memory after it."""
        if self._stream is None:
            return
        self._inputs.tensors["positions"].fill_(-1)
        nothing = [PromptChunk(0, np.zeros(1, np.int64), 0)]
        capturer = Capturer(self._stream, self._addresses, has_collectives=self._group is not None)
        with self._attributed():
            sizes = sorted(self._prompt_sizes.chunks, reverse=True)
            prompts = [Prompts.of(self._prompt_sizes.pack(nothing, size), self._device) for size in sizes]
            batches = captured_sizes(self.max_num_seqs)[::-1]
            prefills = [partial(self._prompt_step, prompt) for prompt in prompts]
            captured = capturer.capture([*prefills, *(partial(self._step, batch) for batch in batches)])
            of_prompts, of_batches = captured[: len(sizes)], captured[len(sizes) :]
            self._prefill_graphs = dict(zip(sizes, zip(of_prompts, prompts, strict=True), strict=True))
            self._graphs = dict(zip(batches, of_batches, strict=True))
            first = self._first_tokens.start(self._prompt_logits, np.zeros(1, np.int64), [None], [], self._tokens)
            first.wait()
        torch.cuda.synchronize(self._device)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.no_grad():
            yield

    @contextmanager
    def _attributed(self) -> Iterator[None]:
        """Tell a lack of memory from other failures, and leave what was taken for the step."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(f"the GPU has no memory for this step: {str(error).splitlines()[0]}") from error


def _check_device(source: WeightSource, device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY and any(entry.dtype == "F8_E4M3" for entry in source.entries.values()):
        major, minor = capability
        raise RunnerError(
            f"FP8 needs compute capability 8.9 or later, this GPU has {major}.{minor}; build with --precision bf16"
        )
