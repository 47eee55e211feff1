"""A rank but the first of a model that is split over several GPUs: a process that does what the first one does.

    python -m deepseek_triton.ensemble.engine.runners.cuda.worker PIPE LIFELINE

Started by ranks.py with two file descriptors. Through PIPE come a `Job`, then calls by name; what goes back is
"loaded", "ready", or "failed" with the reason in one line. LIFELINE says nothing: its end is the end of the first
process, and of this one.
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
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightSource
from deepseek_triton.ensemble.text.errors import one_line


@dataclass(frozen=True)
class RankJob:
    """What one rank runs; the fields are CudaRunner's and Group's."""

    source: WeightSource
    split: ShardedDecoder
    device: str
    dtype: torch.dtype
    max_num_seqs: int
    max_num_batched_tokens: int
    is_invariant: bool
    rendezvous: Path
    timeout_s: float

    def group(self, meet: Callable[[], None]) -> Group:
        """The rank's place among the others, whom it hasn't met."""
        return Group(
            self.split, torch.device(self.device), self.rendezvous,
            meet=meet, timeout_s=self.timeout_s, is_invariant=self.is_invariant,
        )  # fmt: skip

    def make(self, group: Group) -> CudaRunner:
        """Load the rank's part, meet the others, and warm up.

        Raises:
            RunnerError: as CudaRunner.
        """
        return CudaRunner(
            self.source, self.split.whole,
            max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens,
            is_invariant=self.is_invariant,
            device=self.device, dtype=self.dtype, group=group,
        )  # fmt: skip


class Mirror:
    """The first rank's calls on this one's runner: begun alike, their results left alone."""

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
    except EOFError:  # the first rank has gone
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
        raise RunnerError(f"expected the others to join, the first rank said {name}")


def _mirror(runner: CudaRunner, pipe: Connection) -> None:
    mirror = Mirror(runner)
    calls: dict[str, Callable[..., None]] = {
        name: getattr(mirror, name) for name in ("start_decode", "start_prefill", "prefill_many", "copy_prefix")
    }
    while True:
        name, arguments = pipe.recv()
        if name == "close":
            return
        calls[name](*arguments)


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)  # whatever the main thread waits for, in the GPU's driver perhaps


if __name__ == "__main__":
    from deepseek_triton.ensemble.engine.runners.cuda import worker  # the RankJob that is unpickled is that module's

    sys.exit(worker.main(sys.argv[1:]))
