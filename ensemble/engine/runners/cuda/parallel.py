"""Tensor parallelism behind the interface of one runner: this process is rank 0 and starts the other ranks.

Every rank runs a `CudaRunner` on its shards. Rank 0 broadcasts each call before it makes the call itself. All ranks
compute the same logits and sample the same tokens, so nothing has to be sent back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError
from deepseek_triton.ensemble.artefacts.cuda_split import EXPERTS, TENSOR, ShardedDecoder
from deepseek_triton.ensemble.engine.runners.base import Decoded, DeviceSampling, Ids, Logits, PromptChunk, RunnerError
from deepseek_triton.ensemble.engine.runners.cuda.limits import Limits
from deepseek_triton.ensemble.engine.runners.cuda.packing import PackingRunner
from deepseek_triton.ensemble.engine.runners.cuda.pages import SLOTS, CacheForm
from deepseek_triton.ensemble.engine.runners.cuda.ranks import END_S, START_S, STEP_S, Ranks
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightSource
from deepseek_triton.ensemble.engine.runners.cuda.worker import RankJob
from deepseek_triton.ensemble.processes.temp_dirs import make_directory, remove_directory


class ParallelRunner(PackingRunner):
    """A `CudaRunner` on `size` GPUs. Implements `SamplingRunner` and `PipelinedRunner`.

    With FP8 each rank scales its own columns of a token's activation by their largest magnitude: at least as fine as
    one scale for the whole.

    Args:
        source, shape, max_num_seqs, max_num_batched_tokens, is_invariant, cache_form, dtype: as CudaRunner's; the
            source must be picklable.
        size: ranks that share out attention and MLPs. expert_size: groups of ranks that share out the experts whole;
            see `Split`. There are as many ranks as the larger of both, one for each of the first devices.
        device_type: "cuda" with NCCL; "cpu" with gloo, for tests under Triton's interpreter.
        on_failure: called with the reason in one line when a rank failed, died or hangs: the model can't go on, and
            this process may hang in a call.
        start_s, step_s: seconds that loading, twice, and any call may take.

    Raises:
        RunnerError: the model can't be split over `size` ranks, there are too few GPUs, this process runs another
            ParallelRunner, or a rank's CudaRunner fails.
    """

    def __init__(
        self,
        source: WeightSource,
        shape: DecoderShape,
        *,
        size: int,
        expert_size: int = 1,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        is_invariant: bool = False,
        cache_form: CacheForm = SLOTS,
        device_type: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        on_failure: Callable[[str], None] | None = None,
        start_s: float = START_S,
        step_s: float = STEP_S,
    ) -> None:
        self.max_num_seqs, self.max_seq_len, self.vocab_size = max_num_seqs, shape.max_seq_len, shape.vocab_size
        self._limits = Limits(max_num_seqs, shape.max_seq_len, max_num_batched_tokens)
        try:
            first = ShardedDecoder(shape, 0, size, expert_size)
        except LayoutError as error:
            raise RunnerError(str(error)) from error
        splits = [replace(first, rank=rank) for rank in range(first.size)]
        if device_type == "cuda" and torch.cuda.device_count() < first.size:
            setting = TENSOR if size == first.size else EXPERTS
            raise RunnerError(
                f"{setting} is {first.size}, torch sees {torch.cuda.device_count()} NVIDIA GPUs here; lower it"
            )
        if torch.distributed.is_initialized():
            raise RunnerError("this process runs a split model already; close the other first")
        self._directory = make_directory("deepseek-triton-ranks-")
        jobs = [
            RankJob(
                source, split, f"cuda:{split.rank}" if device_type == "cuda" else device_type, dtype,
                max_num_seqs, max_num_batched_tokens, is_invariant, cache_form,
                self._directory / "rendezvous", start_s,
            )
            for split in splits
        ]  # fmt: skip
        self._on_failure = on_failure
        self._ranks = Ranks(jobs[1:], on_failure=self._end, start_s=start_s, step_s=step_s)
        self._group = jobs[0].group(self._ranks.meet)
        try:
            self._runner = jobs[0].make(self._group)
            self.max_seq_len, self.num_blocks = self._runner.max_seq_len, self._runner.num_blocks
            self._ranks.ready()
        except Exception as error:
            self.close()
            self._ranks.check()
            if isinstance(error, RunnerError):
                raise RunnerError(f"rank 0: {error}") from error
            raise

    def __enter__(self) -> ParallelRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The other ranks' process ids."""
        return self._ranks.pids

    # ---- Runner

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """See Runner."""
        with self._ranks.collective():
            self._ranks.broadcast("copy_prefix", source, target, num_tokens)
            self._runner.copy_prefix(source, target, num_tokens)

    def set_blocks(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """See PagedRunner."""
        with self._ranks.collective(is_launching=False):
            self._ranks.broadcast("set_blocks", slot, first, blocks)
            self._runner.set_blocks(slot, first, blocks)

    def close(self) -> None:
        """End the other ranks and free this one's memory; a second call does nothing."""
        self._ranks.close()
        if "_runner" in self.__dict__:
            runner = self.__dict__.pop("_runner")
            if not runner.ends_within(END_S):  # a step in flight waits for a rank that is gone
                self._abort()
            runner.close()
        self._ranks.wait_until_gone()
        self._group.free()
        remove_directory(self._directory)

    def _end(self, reason: str) -> None:
        self._abort()
        if self._on_failure is not None:
            self._on_failure(reason)

    def _abort(self) -> None:
        # In a thread of its own: NCCL's abort ends the kernels that wait and then returns only when the CUDA graphs
        # that hold its collectives are gone, which is what `close` does next.
        threading.Thread(target=self._group.abort, name="abort", daemon=True).start()

    # ---- SamplingRunner

    def prefill_many(self, chunks: Sequence[PromptChunk]) -> Logits:
        """See CudaRunner."""
        self._limits.check_prefill(chunks)
        with self._ranks.collective():
            self._ranks.broadcast("prefill_many", chunks)
            return self._runner.prefill_many(chunks)

    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See SamplingRunner."""
        self._runner.check_start_decode(ids, positions)
        with self._ranks.collective():
            self._ranks.broadcast("start_decode", ids, positions, list(samplings))
            self._runner.start_decode(ids, positions, samplings, logits_rows)

    def finish_decode(self) -> Decoded:
        """See SamplingRunner."""
        with self._ranks.collective(is_launching=False):
            return self._runner.finish_decode()

    # ---- PipelinedRunner

    def start_prefill(
        self, chunks: Sequence[PromptChunk], samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See PipelinedRunner."""
        self._runner.check_start_prefill(chunks)
        with self._ranks.collective():
            self._ranks.broadcast("start_prefill", chunks, list(samplings))
            self._runner.start_prefill(chunks, samplings, logits_rows)

    def finish_prefill(self) -> Decoded:
        """See PipelinedRunner."""
        with self._ranks.collective(is_launching=False):
            return self._runner.finish_prefill()

    def abandon(self) -> None:
        """See PipelinedRunner; the other ranks finish the steps in flight."""
        with self._ranks.collective():
            self._runner.abandon()
