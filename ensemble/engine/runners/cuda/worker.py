"""The process of tensor-parallel rank 1 or higher: it repeats the calls of rank 0.

    python -m deepseek_triton.ensemble.engine.runners.cuda.worker PIPE LIFELINE

ranks.py starts it with two file descriptors. PIPE brings a `RankJob`, then calls by name; the process answers "loaded",
"ready", or "failed" with the reason in one line. LIFELINE carries no data: when it closes, rank 0 has ended, and this
process ends too.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.engine.runners.base import DeviceSampling, Ids, PromptChunk, RunnerError
from deepseek_triton.ensemble.engine.runners.cuda.group import Group
from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightSource
from deepseek_triton.ensemble.text.errors import one_line


@dataclass(frozen=True)
class RankJob:
    """Arguments of one rank's CudaRunner and Group."""

    source: WeightSource
    split: ShardedDecoder
    device: str
    dtype: torch.dtype
    max_num_seqs: int
    max_num_batched_tokens: int
    is_invariant: bool
    cache_form: CacheForm
    rendezvous: Path
    timeout_s: float

    def group(self, meet: Callable[[], None]) -> Group:
        """The rank's Group, not yet connected."""
        return Group(
            self.split, torch.device(self.device), self.rendezvous,
            meet=meet, timeout_s=self.timeout_s, is_invariant=self.is_invariant,
        )  # fmt: skip

    def make(self, group: Group) -> CudaRunner:
        """Load the rank's shards, connect to the other ranks, and warm up.

        Raises:
            RunnerError: as CudaRunner.
        """
        return CudaRunner(
            self.source, self.split.whole,
            max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens,
            is_invariant=self.is_invariant, cache_form=self.cache_form,
            device=self.device, dtype=self.dtype, group=group,
        )  # fmt: skip


class Mirror:
    """Repeats rank 0's calls on this rank's runner; their results are not read."""

    def __init__(self, runner: CudaRunner) -> None:
        self._runner = runner
        self._in_flight = {"decode": 0, "prefill": 0}

    def start_decode(self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None]) -> None:
        """As CudaRunner's."""
        self._make_room("decode", self._runner.finish_decode)
        self._runner.start_decode(ids, positions, samplings, [])

    def start_prefill(self, chunks: Sequence[PromptChunk], samplings: Sequence[DeviceSampling | None]) -> None:
        """As CudaRunner's."""
        self._make_room("prefill", self._runner.finish_prefill)
        self._runner.start_prefill(chunks, samplings, [])

    def prefill_many(self, chunks: Sequence[PromptChunk]) -> None:
        """As CudaRunner's."""
        self._runner.prefill_many(chunks)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """As CudaRunner's."""
        self._runner.copy_prefix(source, target, num_tokens)

    def set_blocks(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """As CudaRunner's."""
        self._runner.set_blocks(slot, first, blocks)

    def _make_room(self, kind: str, finish: Callable[[], object]) -> None:
        if self._in_flight[kind] == self._runner.steps_in_flight:
            finish()
        else:
            self._in_flight[kind] += 1


def main(argv: Sequence[str]) -> int:
    """Run one rank to its end."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    pipe, lifeline = Connection(int(argv[0])), int(argv[1])
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    try:
        job: RankJob = pipe.recv()
        runner = job.make(job.group(lambda: _meet(pipe)))
        pipe.send(("ready", ""))
        _mirror(runner, pipe)
        runner.close()
    except EOFError:  # rank 0 has ended
        return 1
    except RunnerError as error:
        pipe.send(("failed", str(error)))
        return 1
    except Exception as error:
        logging.getLogger(__name__).error("this rank fails", exc_info=error)
        pipe.send(("failed", one_line(error)))
        return 1
    return 0


def _meet(pipe: Connection) -> None:
    pipe.send(("loaded", ""))
    name, _ = pipe.recv()
    if name != "join":
        raise RunnerError(f"expected the call join from rank 0, got {name}")


def _mirror(runner: CudaRunner, pipe: Connection) -> None:
    mirror = Mirror(runner)
    calls: dict[str, Callable[..., None]] = {
        name: getattr(mirror, name)
        for name in ("start_decode", "start_prefill", "prefill_many", "copy_prefix", "set_blocks")
    }
    while True:
        name, arguments = pipe.recv()
        if name == "close":
            return
        calls[name](*arguments)


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)  # the main thread may hang in the driver


if __name__ == "__main__":
    from deepseek_triton.ensemble.engine.runners.cuda import (
        worker,
    )  # so that the unpickled RankJob is that module's, not __main__'s

    sys.exit(worker.main(sys.argv[1:]))
