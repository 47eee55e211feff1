"""One decode step: the next token of every running sequence, chosen by the runner or here.

A runner that can choose tokens does so for the sequences that need nothing else, and computes while the caller does
something else; for the others, and with other runners, the logits come to the host. It knows neither slots' owners nor
clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ensemble.engine.runners.base import Draw, DrawingRunner, Ids, Logits, Runner
from ensemble.engine.sequence import Sequence as TokenSequence
from ensemble.guided import GuideError, fill_masks
from ensemble.sampling import Sampled, SamplingError, choose

Outcome = Sampled | Exception


class Decoder:
    """Starts and finishes decode steps; one at a time."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._drawing = runner if isinstance(runner, DrawingRunner) else None
        self._mask_words = -(-runner.vocab_size // 32)
        self._by_slot: dict[int, TokenSequence] = {}
        self._inputs: tuple[Ids, Ids] = (np.empty(0, np.int64), np.empty(0, np.int64))
        self._draws: list[Draw | None] = []
        self._logits_rows: list[int] = []

    def start(self, sequences: Sequence[TokenSequence], positions: Mapping[int, int]) -> None:
        """Begin a step that advances `sequences`; `positions` has one for every slot (Scheduler.positions)."""
        by_slot = {sequence.slot: sequence for sequence in sequences if sequence.slot is not None}
        num_rows = max(by_slot) + 1
        ids, rows = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
        for slot in range(num_rows):
            rows[slot] = positions[slot]
        self._draws, self._logits_rows = [None] * num_rows, []
        for slot, sequence in by_slot.items():
            ids[slot] = sequence.output_ids[-1]
            if self._drawing is not None:
                self._draws[slot] = draw = self._draw(sequence, self._drawing)
                if draw is None:
                    self._logits_rows.append(slot)
        self._by_slot, self._inputs = by_slot, (ids, rows)
        if self._drawing is not None:
            self._drawing.start_decode(ids, rows, self._draws, self._logits_rows)

    def finish(self) -> list[tuple[TokenSequence, Outcome]]:
        """Wait for the step and choose what the runner didn't; an error concerns its sequence alone.

        A sequence may have lost its slot meanwhile, for it was cancelled: its token is nobody's.
        """
        if self._drawing is None:
            logits = self._runner.decode(*self._inputs)
            sequences = list(self._by_slot.values())
            return list(zip(sequences, self.choose(sequences, [logits[slot] for slot in self._by_slot]), strict=True))
        decoded = self._drawing.finish_decode()
        left = [self._by_slot[slot] for slot in self._logits_rows]
        outcomes: list[tuple[TokenSequence, Outcome]] = list(
            zip(left, self.choose(left, list(decoded.logits)), strict=True)
        )
        for slot, sequence in self._by_slot.items():
            if self._draws[slot] is not None:
                outcomes.append((sequence, _drawn(sequence, int(decoded.tokens[slot]), float(decoded.log_probs[slot]))))
        return outcomes

    def choose(self, sequences: Sequence[TokenSequence], logits: Sequence[Logits]) -> list[Outcome]:
        """The next token of each sequence from its own row of logits [vocab_size]."""
        masks = self._masks(sequences)
        return [
            mask if isinstance(mask, GuideError) else _choose(sequence, row, mask)
            for sequence, row, mask in zip(sequences, logits, masks, strict=True)
        ]

    def _masks(self, sequences: Sequence[TokenSequence]) -> list[NDArray[np.uint32] | GuideError | None]:
        """Which tokens each sequence's guide allows, all asked for in one call."""
        masks: list[NDArray[np.uint32] | GuideError | None] = [None] * len(sequences)
        guided = [(i, s.guide) for i, s in enumerate(sequences) if s.guide is not None and s.is_guided]
        if guided:
            words = np.empty((len(guided), self._mask_words), np.uint32)
            errors = fill_masks([guide for _, guide in guided], words)
            for row, (i, _) in enumerate(guided):
                masks[i] = errors.get(row, words[row])
        return masks

    def _draw(self, sequence: TokenSequence, runner: DrawingRunner) -> Draw | None:
        if sequence.is_guided or sequence.bad_words is not None:
            return None
        if sequence.thinking is not None and sequence.thinking.forced_token is not None:
            return None
        draw = sequence.sampler.draw()
        return draw if draw is not None and runner.can_draw(draw) else None


def _choose(sequence: TokenSequence, logits: Logits, mask: NDArray[np.uint32] | None) -> Outcome:
    forced = None if sequence.thinking is None else sequence.thinking.forced_token
    try:
        if forced is not None:
            if sequence.bad_words is not None:
                sequence.bad_words.push(forced)
            return sequence.sampler.force(forced, logits)
        return choose(sequence.sampler, sequence.bad_words, logits, mask)
    except Exception as error:  # a SamplingError, or whatever a client's words make of an odd token: this one's alone
        return error


def _drawn(sequence: TokenSequence, token: int, log_prob: float) -> Outcome:
    if not np.isfinite(log_prob):
        return SamplingError.not_finite()
    sequence.sampler.push(token)
    return Sampled(token, log_prob)
