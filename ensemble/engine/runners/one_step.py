"""Any runner as a PipelinedRunner that has one step in flight.

What such a runner can't begin without waiting is computed when it is finished, so that the loop knows one way only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepseek_triton.ensemble.engine.runners.base import (
    Decoded,
    DeviceSampling,
    Ids,
    PipelinedRunner,
    PromptChunk,
    Runner,
    SamplingRunner,
)

NO_TOKENS, NO_LOG_PROBS = np.empty(0, np.int64), np.empty(0, np.float32)


class OneStep:
    """Decodes as `runner` does, sampling if it can; prefills one chunk at a time, and hands out its logits."""

    steps_in_flight = 1
    packs_prompts = False

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._sampling_runner = runner if isinstance(runner, SamplingRunner) else None
        self._decode: tuple[Ids, Ids, Sequence[int]] | None = None
        self._prefills: list[PromptChunk] = []

    def can_sample(self, sampling: DeviceSampling) -> bool:
        """See SamplingRunner."""
        return self._sampling_runner is not None and self._sampling_runner.can_sample(sampling)

    def start_decode(
        self, ids: Ids, positions: Ids, samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See SamplingRunner."""
        if self._sampling_runner is not None:
            self._sampling_runner.start_decode(ids, positions, samplings, logits_rows)
        self._decode = ids, positions, logits_rows

    def finish_decode(self) -> Decoded:
        """See SamplingRunner."""
        assert self._decode is not None, "no decode was begun"
        (ids, positions, rows), self._decode = self._decode, None
        if self._sampling_runner is not None:
            return self._sampling_runner.finish_decode()
        logits = self._runner.decode(ids, positions)
        return Decoded(NO_TOKENS, NO_LOG_PROBS, logits[list(rows)])

    def start_prefill(
        self, chunks: Sequence[PromptChunk], samplings: Sequence[DeviceSampling | None], logits_rows: Sequence[int]
    ) -> None:
        """See PipelinedRunner."""
        self._prefills += chunks

    def finish_prefill(self) -> Decoded:
        """See PipelinedRunner."""
        chunk = self._prefills.pop(0)
        logits = self._runner.prefill(chunk.slot, chunk.ids, chunk.start)
        return Decoded(NO_TOKENS, NO_LOG_PROBS, logits[None])

    def abandon(self) -> None:
        """See PipelinedRunner."""
        self._prefills.clear()
        is_running, self._decode = self._sampling_runner is not None and self._decode is not None, None
        if self._sampling_runner is not None and is_running:
            self._sampling_runner.finish_decode()


def pipelined(runner: Runner) -> PipelinedRunner:
    """`runner` itself, if it can have several steps in flight."""
    return runner if isinstance(runner, PipelinedRunner) else OneStep(runner)
