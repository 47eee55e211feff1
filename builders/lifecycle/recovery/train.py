"""The training loop: steps, judgements on held-out text, states to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.lifecycle.recovery.loss import distillation
from deepseek_triton.builders.lifecycle.recovery.options import RecoverOptions
from deepseek_triton.builders.lifecycle.recovery.state import BEST, TrainingState
from deepseek_triton.builders.lifecycle.recovery.windows import Ids, Windows

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_DECAY, MAX_GRADIENT_NORM = 0.0, 1.0
TOLD_EVERY_S = 20.0


@dataclass(frozen=True)
class Judgement:
    """How the student does on held-out text after `step` steps: means over tokens, in nats but for `agreement`."""

    step: int
    objective: float
    kl: float
    cross_entropy: float
    agreement: float


class Trainer:
    """A student beside its teacher. state: where it is saved; what lies there already is gone on from."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        windows: Windows,
        options: RecoverOptions,
        device: str,
        state: TrainingState,
    ) -> None:
        import torch

        self._torch, self._student, self._teacher = torch, student, teacher.eval()
        self._windows, self._options, self._device, self._state = windows, options, device, state
        self._trained: list[Tensor] = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=options.highest_rate, weight_decay=WEIGHT_DECAY)
        self.step = 0
        self.judgements: list[Judgement] = []
        torch.manual_seed(options.seed)
        self._resume()

    @property
    def best(self) -> Judgement:
        """The judgement with the lowest objective."""
        return min(self.judgements, key=lambda one: one.objective)

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken, or the last judgements brought nothing better."""
        if self.step >= self._options.steps:
            return True
        return len(self.judgements) - 1 - self.judgements.index(self.best) >= self._options.patience

    def run(self, report: Report, say: Callable[[str], None]) -> None:
        """Train until it is done; the student has its best weights then.

        Raises:
            BuildError: the loss isn't finite, or a state can't be saved.
        """
        options = self._options
        if not self.judgements:
            self._judge(say)
        told = started = time.monotonic()
        first = self.step
        while not self.is_done:
            loss = self._take_step()
            report("train", self.step, options.steps)
            now = time.monotonic()
            if now - told >= TOLD_EVERY_S:
                told = now
                left = (now - started) / (self.step - first) * (options.steps - self.step)
                say(f"step {self.step} of {options.steps}: loss {loss:.4f}, {describe_time(left)} left")
            is_last = self.step >= options.steps
            if is_last or self.step % options.evaluate_every == 0:
                self._judge(say)
            if is_last or self.step % options.save_every == 0:
                self._save()
        best = self._state.load(BEST)
        if best is None:
            raise BuildError(f"{self._state.directory} lost its best weights; begin anew with --restart")
        self._put(best["trained"])

    def _take_step(self) -> float:
        """One step of the optimizer on a batch, in parts of `micro_batch` windows; the mean loss of it."""
        torch, options = self._torch, self._options
        rate = options.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._student.train()
        total = 0.0
        batch = self._windows.batch(self.step, options.batch_size, options.seed)
        for part in _parts(batch, options.micro_batch):
            loss = self._losses(part).objective * (len(part) / len(batch))
            loss.backward()
            total += float(loss.detach())
        if not torch.isfinite(torch.tensor(total)):
            raise BuildError(
                f"the loss is {total} at step {self.step}: lower --learning-rate, or check the checkpoints"
            )
        torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def _losses(self, batch: Ids) -> Any:
        ids = self._torch.from_numpy(batch).to(self._device)
        options = self._options
        with self._torch.no_grad(), self._precision():
            wanted = self._teacher(input_ids=ids[:, :-1], use_cache=False).logits
        with self._precision():
            found = self._student(input_ids=ids[:, :-1], use_cache=False).logits
        return distillation(found, wanted, ids[:, 1:], kl_weight=options.kl_weight, temperature=options.temperature)

    def _judge(self, say: Callable[[str], None]) -> None:
        """Measure on held-out text; the best weights are kept."""
        self._student.eval()
        held_out, names = self._windows.held_out, ("objective", "kl", "cross_entropy", "agreement")
        sums = dict.fromkeys(names, 0.0)
        with self._torch.no_grad():
            for part in _parts(held_out, self._options.micro_batch):
                losses = self._losses(part)
                for name in names:
                    sums[name] += float(getattr(losses, name)) * len(part)
        judgement = Judgement(self.step, **{name: total / len(held_out) for name, total in sums.items()})
        self.judgements.append(judgement)
        say(f"step {judgement.step}: held-out {describe(judgement)}")
        if self.best == judgement:
            self._state.save({"step": self.step, "trained": self._weights()}, BEST)

    def _precision(self) -> AbstractContextManager[Any]:
        """bfloat16 products on a GPU; float32 on a processor."""
        if self._device == "cpu":
            return nullcontext()
        return self._torch.autocast(self._device, dtype=self._torch.bfloat16)

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().cpu() for parameter in self._trained]

    def _put(self, weights: list[Tensor]) -> None:
        with self._torch.no_grad():
            for parameter, saved in zip(self._trained, weights, strict=True):
                parameter.copy_(saved)

    def _save(self) -> None:
        torch = self._torch
        self._state.save({
            "step": self.step,
            "trained": self._weights(),
            "optimizer": self._optimizer.state_dict(),
            "judgements": [asdict(one) for one in self.judgements],
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state() if self._device != "cpu" else None,
        })  # fmt: skip

    def _resume(self) -> None:
        saved = self._state.load()
        if saved is None:
            return
        self.step = saved["step"]
        self._put(saved["trained"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.judgements = [Judgement(**one) for one in saved["judgements"]]
        self._torch.set_rng_state(saved["random"])
        if saved["random_gpu"] is not None and self._device != "cpu":
            self._torch.cuda.set_rng_state(saved["random_gpu"])


def describe(judgement: Judgement) -> str:
    """The figures in one line."""
    import math

    return (
        f"perplexity {math.exp(min(judgement.cross_entropy, 700)):.3f}, KL {judgement.kl:.4f}, "
        f"top-1 agreement {judgement.agreement:.2%}"
    )


def describe_time(seconds: float) -> str:
    """As a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _parts(batch: Ids, size: int) -> Iterator[Ids]:
    for start in range(0, len(batch), size):
        yield batch[start : start + size]
