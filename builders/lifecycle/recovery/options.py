"""What `recover` is told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError

# Measured for the whole model (benchmarks/results/recover-cpu.md); that of LoRA is a usual one.
LEARNING_RATE, LORA_LEARNING_RATE = 1e-4, 3e-4
DEVICES = ("auto", "cpu", "gpu")


@dataclass(frozen=True)
class RecoverOptions:
    """A student that is trained to answer as its teacher does.

    text: UTF-8 file to train on. held_out: another that it is judged on; None: the end of `text`. steps: of the
    optimizer. learning_rate: its highest; None: LEARNING_RATE, for LoRA LORA_LEARNING_RATE. batch_size: windows in a
    step. micro_batch: windows that are computed at once. window_len: tokens. kl_weight: of the divergence from the
    teacher; the rest is that of the cross-entropy of the text. lora_rank: of LoRA; None: all weights are trained.
    evaluate_every: steps between judgements. patience: judgements without a better one before it stops.
    save_every: steps between states that a killed run goes on from. restarts: leave what an earlier run did.

    Raises:
        BuildError: a value out of range.
    """

    student: Path
    teacher: Path
    text: Path
    output: Path
    held_out: Path | None = None
    steps: int = 400
    learning_rate: float | None = None
    batch_size: int = 16
    micro_batch: int = 4
    window_len: int = 512
    kl_weight: float = 0.9
    temperature: float = 1.0
    lora_rank: int | None = None
    evaluate_every: int = 25
    patience: int = 4
    save_every: int = 25
    seed: int = 0
    device: str = "auto"
    restarts: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "evaluate_every", "patience", "save_every"):
            if getattr(self, name) < 1:
                raise BuildError(f"{name.replace('_', '-')} is {getattr(self, name)}, must be at least 1")
        if self.window_len < 2:
            raise BuildError(f"window is {self.window_len}, must be at least 2 tokens")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise BuildError(f"lora-rank is {self.lora_rank}, must be at least 1")
        if not 0 <= self.kl_weight <= 1:
            raise BuildError(f"kl-weight is {self.kl_weight}, must lie between 0 and 1")
        for name, value in (("learning-rate", self.highest_rate), ("temperature", self.temperature)):
            if not (math.isfinite(value) and value > 0):
                raise BuildError(f"{name} is {value}, must be a number above 0")
        if self.device not in DEVICES:
            raise BuildError(f"device is {self.device!r}, must be one of {', '.join(DEVICES)}")

    @property
    def highest_rate(self) -> float:
        """The learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATE if self.lora_rank is None else LORA_LEARNING_RATE

    def settings(self) -> dict[str, Any]:
        """What changes the result: for the provenance, and to know whether a state is this run's."""
        left_out = ("student", "teacher", "text", "output", "held_out", "save_every", "restarts", "device")
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {**values, "learning_rate": self.highest_rate}

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0: a linear warm-up over a twentieth, then a cosine down to a tenth."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return self.highest_rate * (step + 1) / warm
        part = (step - warm) / max(1, self.steps - warm)
        return self.highest_rate * (0.55 + 0.45 * math.cos(math.pi * part))
