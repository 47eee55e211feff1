"""What `learn` is told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.learning.examples import ON_BAD

DEVICES = ("auto", "cpu", "cuda")
NOT_IN_PROVENANCE = ("checkpoint", "data", "replay", "output", "save_every", "restarts", "device", "bad_lines")


@dataclass(frozen=True)
class LearnOptions:
    """A checkpoint that learns new data with LoRA, beside replay data that keep it from forgetting.

    data, replay: JSON lines. replay_share: of each batch. held_out: share of the lines that is the gate's. epochs: how
    often each new example is seen. learning_rate: its highest. batch_size: examples in a step. micro_batch: those that
    are computed at once. window_len: tokens of an example at most. save_every: steps between states that a killed run
    goes on from. bad_lines: "refuse" or "skip". restarts: leave what an earlier run did.

    Raises:
        BuildError: a value out of range.
    """

    checkpoint: Path
    data: Path
    replay: Path
    output: Path
    replay_share: float = 0.25
    held_out: float = 0.1
    epochs: int = 3
    learning_rate: float = 5e-4
    lora_rank: int = 16
    batch_size: int = 8
    micro_batch: int = 4
    window_len: int = 512
    save_every: int = 10
    seed: int = 0
    device: str = "auto"
    bad_lines: str = ON_BAD[0]
    restarts: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "lora_rank", "batch_size", "micro_batch", "save_every"):
            if getattr(self, name) < 1:
                raise BuildError(f"{name.replace('_', '-')} is {getattr(self, name)}, must be at least 1")
        if self.window_len < 2:
            raise BuildError(f"window is {self.window_len}, must be at least 2 tokens")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise BuildError(f"learning-rate is {self.learning_rate}, must be a number above 0")
        if not 0 <= self.replay_share < 1:
            raise BuildError(f"replay-share is {self.replay_share}, must be at least 0 and below 1")
        if not 0 < self.held_out < 1:
            raise BuildError(f"held-out is {self.held_out}, must lie between 0 and 1")
        for name, known in (("device", DEVICES), ("bad_lines", ON_BAD)):
            if getattr(self, name) not in known:
                what = name.replace("_", "-")
                raise BuildError(f"{what} is {getattr(self, name)!r}, must be one of {', '.join(known)}")

    @property
    def num_replayed(self) -> int:
        """Replay examples in a batch; one that has any new one has room for it."""
        return min(self.batch_size - 1, round(self.batch_size * self.replay_share))

    def settings(self) -> dict[str, Any]:
        """What changes the result: for the provenance, and to know whether a state is this run's."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IN_PROVENANCE}

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0: a linear warm-up over a twentieth, then a cosine down to a tenth."""
        warm = max(1, steps // 20)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        part = (step - warm) / max(1, steps - warm)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * part))
