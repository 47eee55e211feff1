"""What the gate measures of a checkpoint: losses on held-out data, greedy answers, speed, bytes of weights."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.texts.calibration_text import load_tokenizer
from deepseek_triton.builders.lifecycle.gate.limits import Check
from deepseek_triton.builders.lifecycle.learning.examples import Lesson
from deepseek_triton.builders.lifecycle.learning.tokens import tokenize

if TYPE_CHECKING:
    from deepseek_triton.ensemble.text.tokenizer import Tokenizer

SPEED_PROMPT, SPEED_TOKENS = 32, 24
BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class GateFigures:
    """losses: name of the data → nats a token. answers: check's name → the greedy answer. weight_bytes: as stored.

    process_bytes: the highest memory of the process that ran a build; None: a checkpoint was measured.
    """

    losses: Mapping[str, float]
    answers: Mapping[str, str]
    weight_bytes: int
    process_bytes: int | None = None


class Subject:
    """One of the two checkpoints, loaded."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        from deepseek_triton.builders.lifecycle.recovery.models import load_model

        self.checkpoint, self._device = checkpoint, device
        self._tokenizer: Tokenizer = load_tokenizer(checkpoint)
        self._model: Any = load_model(checkpoint, device).eval()

    def measure(
        self, data: Mapping[str, Sequence[Lesson]], checks: Sequence[Check], window_len: int, micro_batch: int
    ) -> GateFigures:
        """Everything but speed.

        Raises:
            BuildError: data has no token to predict, or a check's chat doesn't fit the template.
        """
        from deepseek_triton.builders.lifecycle.learning.loss import mean_loss

        spec = self.checkpoint.spec
        losses = {}
        for name, examples in data.items():
            sequences = tokenize(examples, self._tokenizer, min(window_len, spec.max_seq_len), spec.eos_token_ids[0])
            if not sequences:
                raise BuildError(f"no example of the {name} data is held out: the gate has nothing to judge by")
            losses[name] = mean_loss(self._model, sequences, self._device, micro_batch)
        answers = {check.name: self._answer(check) for check in checks}
        stored = (self.checkpoint.stored_dtype(name) for name in spec.tensor_shapes())
        sizes = (int(np.prod(shape)) for shape in spec.tensor_shapes().values())
        return GateFigures(losses, answers, sum(size * BYTES[dtype] for size, dtype in zip(sizes, stored, strict=True)))

    def tokens_per_s(self) -> float:
        """Tokens a second of one greedy answer, by this process: to compare two checkpoints, not to promise a speed."""
        prompt = np.arange(SPEED_PROMPT) % self.checkpoint.spec.vocab_size
        begin = time.perf_counter()
        self._generate(prompt, SPEED_TOKENS, ends=())
        return SPEED_TOKENS / (time.perf_counter() - begin)

    def _answer(self, check: Check) -> str:
        spec = self.checkpoint.spec
        ids = prompt_of(check, self._tokenizer, spec.max_seq_len)
        found = self._generate(ids, min(check.max_tokens, spec.max_seq_len - len(ids)), spec.eos_token_ids)
        return self._tokenizer.decode(found)

    def _generate(self, prompt: NDArray[np.int64], num_tokens: int, ends: Sequence[int]) -> list[int]:
        """The likeliest tokens, up to one of `ends`, which is left out."""
        import torch

        ids = torch.from_numpy(prompt)[None].to(self._device)
        with torch.no_grad():
            found: list[int] = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=list(ends) or None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        return found[:-1] if found and found[-1] in ends else found


def prompt_of(check: Check, tokenizer: Tokenizer, max_seq_len: int) -> NDArray[np.int64]:
    """The tokens of a check's prompt or chat.

    Raises:
        BuildError: its chat doesn't fit the template, or it leaves no room for an answer.
    """
    from deepseek_triton.ensemble.text.errors import TextError

    request = {"messages": list(check.messages), "add_generation_prompt": True}
    try:
        ids = tokenizer.encode_messages(json.dumps(request)) if check.messages else tokenizer.encode(check.prompt)
    except TextError as error:
        raise BuildError(f"check {check.name}: {error}") from error
    if len(ids) >= max_seq_len:
        raise BuildError(f"check {check.name}: the prompt has {len(ids)} tokens, the model takes {max_seq_len}")
    if not len(ids):
        raise BuildError(f"check {check.name}: the prompt has no token")
    return np.asarray(ids, np.int64)
