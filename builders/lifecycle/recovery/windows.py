"""The windows of a text that a student is trained and judged on, and the order in which it sees them."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.texts.calibration_text import load_tokenizer, read_text

Ids = NDArray[np.int64]
HELD_OUT = 0.05  # of the text, where no other is given
MAX_HELD_OUT = 32  # windows


@dataclass(frozen=True)
class Windows:
    """train, held_out: token ids, [windows, window_len] each. digests: each text's name → SHA-256 of its tokens."""

    train: Ids
    held_out: Ids
    digests: dict[str, str]

    def batch(self, step: int, batch_size: int, seed: int) -> Ids:
        """The windows of a step, [batch_size, window_len]: an epoch sees each window once, in an order of its own."""
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, offsets = np.divmod(places, len(self.train))
        rows = np.empty(batch_size, np.int64)
        for epoch in np.unique(epochs):
            order = np.random.default_rng((seed, int(epoch))).permutation(len(self.train))
            own = epochs == epoch
            rows[own] = order[offsets[own]]
        return self.train[rows]


def text_windows(
    student: Checkpoint, teacher: Checkpoint, text: Path, held_out: Path | None, window_len: int
) -> Windows:
    """Cut the texts into windows by the tokenizer that both models have.

    Raises:
        BuildError: a text is too short, or the two models don't have one tokenizer.
    """
    if window_len > (most := min(student.spec.max_seq_len, teacher.spec.max_seq_len)):
        raise BuildError(f"window is {window_len}, the models were made for {most} tokens")
    if student.spec.vocab_size != teacher.spec.vocab_size:
        raise BuildError(
            f"{student.path} has {student.spec.vocab_size} tokens, {teacher.path} {teacher.spec.vocab_size}: "
            "give the teacher that the student was made from"
        )
    own, other = load_tokenizer(student), load_tokenizer(teacher)
    digests: dict[str, str] = {}

    def windows(path: Path) -> Ids:
        content = read_text(path)
        ids = np.asarray(own.encode(content), np.int64)
        if not np.array_equal(ids, np.asarray(other.encode(content), np.int64)):
            raise BuildError(
                f"{student.path} and {teacher.path} have different tokenizers: {path.name} gives other tokens"
            )
        digests[path.name] = sha256(ids.tobytes()).hexdigest()
        count = len(ids) // window_len
        return ids[: count * window_len].reshape(count, window_len)

    train = windows(text)
    if held_out is None:
        judged = min(MAX_HELD_OUT, max(1, int(len(train) * HELD_OUT)))
        if len(train) < 2:
            raise BuildError(f"{text} has less than two windows of {window_len} tokens: give a longer text")
        return Windows(train[:-judged], train[-judged:], digests)
    other_windows = windows(held_out)[:MAX_HELD_OUT]
    for path, found in ((text, train), (held_out, other_windows)):
        if not len(found):
            raise BuildError(f"{path} has less than a window of {window_len} tokens: give a longer text")
    return Windows(train, other_windows, digests)
