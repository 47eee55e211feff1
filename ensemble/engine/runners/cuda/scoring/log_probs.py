"""What is read of a pass: log probabilities of targets, and states after the last norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.buffers import staged
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.sampling import Scanned, scan
from deepseek_triton.ensemble.engine.runners.cuda.scoring.passes import ScoredSequence
from deepseek_triton.ensemble.scoring.rows import ScoreRow


@dataclass(frozen=True)
class ReadPositions:
    """What a pass's logits are read for; a line is a row of the logits.

    targets: the row, and which of its targets, of each of `lines` and `ids`. states: the rows whose first logits are
    `state_lines`.
    """

    targets: list[tuple[int, int]]
    lines: list[int]
    ids: list[int]
    states: list[int]
    state_lines: list[int]


def read_positions(rows: Sequence[ScoreRow], sequences: Sequence[ScoredSequence]) -> ReadPositions:
    """What is read of a pass over `sequences`, whose logits lie one behind the other."""
    found = ReadPositions([], [], [], [], [])
    lines: dict[int, dict[int, int]] = defaultdict(dict)  # row → which of its logits → line
    line = 0
    for sequence in sequences:
        lines[sequence.row].update(zip(sequence.logits.tolist(), count(line), strict=False))
        line += len(sequence.logits)
    for number, of_row in lines.items():
        row = rows[number]
        for target, (logit, token) in enumerate(zip(row.target_logits.tolist(), row.target_ids.tolist(), strict=True)):
            if logit in of_row:
                found.targets.append((number, target))
                found.lines.append(of_row[logit])
                found.ids.append(token)
        if 0 in of_row:
            found.states.append(number)
            found.state_lines.append(of_row[0])
    return found


@dataclass(frozen=True)
class PassResults:
    """Device memory at fixed addresses: logits [lines, vocab_size], states [lines, hidden_size], scans of logits."""

    launch: Launcher
    logits: torch.Tensor
    states: torch.Tensor
    scanned: Scanned

    @classmethod
    def empty(cls, launch: Launcher, num_lines: int, shape: DecoderShape) -> PassResults:
        """Allocate for passes of up to `num_lines` logits."""
        logits = launch.empty(num_lines, shape.vocab_size)
        states = launch.empty(num_lines, shape.hidden_size, dtype=launch.dtype)
        return cls(launch, logits, states, Scanned.empty(launch, num_lines, shape.vocab_size))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them."""
        return self.logits, self.states, self.scanned.best, self.scanned.total

    def keep(self, states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Copy a pass's states and logits [n, …] here, and scan them: the logits [n, vocab_size]. Only launches."""
        n = len(logits)
        self.states[:n].copy_(states)
        kept = self.logits[:n].copy_(logits)
        scan(self.launch, kept, self.scanned)
        return kept

    def read(self, positions: ReadPositions) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Wait for the pass: the targets' log probabilities [n], and the states [m, hidden_size]."""
        device = self.logits.device
        places = np.array([*positions.lines, *positions.ids, *positions.state_lines], np.int64)
        n = len(positions.lines)
        lines, ids, state_lines = staged(places, device).to(device, non_blocking=True).tensor_split([n, 2 * n])
        log_sums = torch.logsumexp(self.scanned.best[lines] + self.scanned.total[lines].log(), 1)
        values = self.logits[lines, ids] - log_sums
        states = self.states[state_lines].float()
        return values.cpu().numpy(), states.cpu().numpy()
