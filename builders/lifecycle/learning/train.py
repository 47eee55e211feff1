"""The training loop of `learn`: steps on new and replayed examples, and states to go on from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.lifecycle.learning.loss import parts, summed_loss
from deepseek_triton.builders.lifecycle.learning.options import LearnOptions
from deepseek_triton.builders.lifecycle.learning.tokens import TokenSequence
from deepseek_triton.builders.lifecycle.recovery.state import TrainingState

if TYPE_CHECKING:
    from torch import Tensor

MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Batches:
    """The examples of each step, which depend on its number alone: a run that goes on sees what it would have seen."""

    new: Sequence[TokenSequence]
    replay: Sequence[TokenSequence]
    options: LearnOptions

    @property
    def num_replayed(self) -> int:
        """Replay examples in a batch."""
        return self.options.num_replayed if self.replay else 0

    @property
    def steps(self) -> int:
        """The steps in which each new example is seen `epochs` times."""
        return math.ceil(len(self.new) * self.options.epochs / (self.options.batch_size - self.num_replayed))

    def at(self, step: int) -> list[TokenSequence]:
        """New examples, then replayed ones."""
        num_new = self.options.batch_size - self.num_replayed
        return [*self._dealt(self.new, step, num_new, 0), *self._dealt(self.replay, step, self.num_replayed, 1)]

    def _dealt(self, source: Sequence[TokenSequence], step: int, count: int, salt: int) -> list[TokenSequence]:
        found = []
        for place in range(step * count, (step + 1) * count):
            epoch, offset = divmod(place, len(source))
            order = np.random.default_rng((self.options.seed, salt, epoch)).permutation(len(source))
            found.append(source[order[offset]])
        return found


def train(model: Any, batches: Batches, device: str, state: TrainingState, report: Report) -> int:
    """Train what of `model` may be trained, from the state on; returns the step that it went on from.

    Raises:
        BuildError: the loss isn't finite, or a state can't be saved.
    """
    import torch

    options, steps = batches.options, batches.steps
    trained: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    first = 0
    if (saved := state.load()) is not None:
        first = saved["step"]
        with torch.no_grad():
            for parameter, values in zip(trained, saved["trained"], strict=True):
                parameter.copy_(values)
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step, steps)
        model.train()
        batch = batches.at(step)
        count = sum(int(one.is_learnt.sum()) for one in batch)
        total = 0.0
        for part in parts(batch, options.micro_batch):
            loss, _ = summed_loss(model, part, device)
            mean: Any = loss / count
            mean.backward()
            total += float(loss.detach()) / count
        if not math.isfinite(total):
            raise BuildError(f"the loss is {total} at step {step}: lower --learning-rate, or check the checkpoint")
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % options.save_every == 0 or step + 1 == steps:
            weights = [parameter.detach().cpu() for parameter in trained]
            state.save({"step": step + 1, "trained": weights, "optimizer": optimizer.state_dict()})
        report("train", step + 1, steps)
    return first
