"""Checkpoint + windows of text → Calibration: what every linear layer's input looks like.

The float model runs layer by layer over the windows; of each input only running statistics are kept. The result is one
JSON file that can be read, compared and used again: it holds the windows too, so that compensation sees the same text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.atomic_files import write_atomically
from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.layer_session import Ids, embed, layer_session
from deepseek_triton.ensemble.decoder.spec import layer_prefix

MIN_TOKENS = 128  # fewer say too little about a range
FORMAT = 1
# Called with what is done now, and its progress and total in units of its own.
Report = Callable[[str, int, int], None]


class CalibrationError(BuildError):
    """The text, or the ranges that it gave, can't be used."""


@dataclass(frozen=True)
class TapStatistics:
    """One linear layer's input over all windows; `channel_*` have one number for each input channel.

    amax: largest magnitude. mean_square: E[x²] of each channel. mean: E[x] of each channel.
    """

    amax: float
    channel_amax: tuple[float, ...]
    mean_square: tuple[float, ...]
    mean: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """Statistics of every tap (`model.layers.N.TAP`, see `ModelSpec.taps`), and what they were taken on.

    windows: token ids, each tuple one sequence. sources: what the text was, in words.
    """

    model: str
    sources: tuple[str, ...]
    windows: tuple[tuple[int, ...], ...]
    taps: dict[str, TapStatistics]

    def window_arrays(self) -> list[Ids]:
        """The windows as arrays [seq_len] int64."""
        return [np.asarray(window, np.int64) for window in self.windows]

    @property
    def max_window_len(self) -> int:
        """Tokens in the longest window."""
        return max(map(len, self.windows))

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))
        write_atomically(path, text.replace('"model.layers.', '\n"model.layers.').encode(), CalibrationError)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CalibrationError: the file can't be read, or is not such a file.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise CalibrationError(f"{path} has another format; calibrate again")
            taps = {
                name: TapStatistics(tap["amax"], *(tuple(tap[key]) for key in ("channel_amax", "mean_square", "mean")))
                for name, tap in values["taps"].items()
            }
            windows = tuple(tuple(window) for window in values["windows"])
            calibration = cls(values["model"], tuple(values["sources"]), windows, taps)
        except OSError as error:
            raise CalibrationError(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"{path} is not a file of activation ranges; calibrate again") from error
        for name, tap in calibration.taps.items():
            check_finite(name, np.array([tap.amax, *tap.channel_amax, *tap.mean_square, *tap.mean]))
        return calibration


def calibrate(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int] | NDArray[Any]],
    sources: Sequence[str] = (),
    report: Report = lambda what, done, total: None,
) -> Calibration:
    """Run the float model over the windows and record each linear layer's input.

    Args:
        checkpoint: read once, in order; its digest changes by that: open another for the build.
        windows: token ids [seq_len] each.
        sources: what the text is, in words, for the file.

    Raises:
        CalibrationError: too few tokens, a token outside the vocabulary, NaN or infinity on the way.
    """
    spec = checkpoint.spec
    arrays = check_windows(windows, spec.vocab_size)
    longest = max(map(len, arrays))
    hidden = embed(checkpoint.read("model.embed_tokens.weight"), arrays)
    taps: dict[str, TapStatistics] = {}
    for layer in range(spec.num_layers):
        report("calibrate", layer, spec.num_layers)
        names = tuple(tap.value for tap in spec.taps(layer))
        running = {name: _Running() for name in names}
        with layer_session(spec, layer, checkpoint.read, max_seq_len=longest, outputs=names) as session:
            for i, window in enumerate(hidden):
                hidden[i], *values = session.run(window, names)
                for name, value in zip(names, values, strict=True):
                    running[name].add(value)
        taps |= {layer_prefix(layer) + name: r.result(layer_prefix(layer) + name) for name, r in running.items()}
    report("calibrate", spec.num_layers, spec.num_layers)
    ids = tuple(tuple(int(token) for token in window) for window in arrays)
    return Calibration(checkpoint.path.name, tuple(sources), ids, taps)


def check_windows(windows: Sequence[Sequence[int] | NDArray[Any]], vocab_size: int) -> list[Ids]:
    """The windows as arrays, once they are known to be usable.

    Raises:
        CalibrationError: none, too few tokens, or one outside the vocabulary.
    """
    arrays = [np.asarray(window, np.int64) for window in windows if len(window)]
    num_tokens = sum(map(len, arrays))
    if num_tokens < MIN_TOKENS:
        raise CalibrationError(f"the text has {num_tokens} tokens, at least {MIN_TOKENS} are needed: give a longer one")
    largest, smallest = max(int(a.max()) for a in arrays), min(int(a.min()) for a in arrays)
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise CalibrationError(f"token {wrong} is outside the vocabulary of {vocab_size}: not this model's tokenizer")
    return arrays


def check_finite(name: str, values: NDArray[Any]) -> None:
    """Raise CalibrationError, naming `name`, where a value is NaN or infinite."""
    if not np.isfinite(values).all():
        kind = "NaN" if np.isnan(values).any() else "infinite"
        raise CalibrationError(f"{name} has {kind} values: the checkpoint is damaged, or overflows in float32")


class _Running:
    """Sums over rows as they come."""

    def __init__(self) -> None:
        self._count = 0
        self._amax: NDArray[Any] = np.zeros(0)
        self._square: NDArray[Any] = np.zeros(0)
        self._sum: NDArray[Any] = np.zeros(0)

    def add(self, rows: NDArray[np.float32]) -> None:
        """rows [seq_len, channels]"""
        amax, square = np.abs(rows).max(axis=0), np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        total = rows.sum(axis=0, dtype=np.float64)
        if self._count:
            amax, square, total = np.maximum(amax, self._amax), square + self._square, total + self._sum
        self._amax, self._square, self._sum, self._count = amax, square, total, self._count + len(rows)

    def result(self, name: str) -> TapStatistics:
        check_finite(name, np.concatenate([self._amax, self._square, self._sum]))
        columns = (self._amax, self._square / self._count, self._sum / self._count)
        channel_amax, mean_square, mean = (tuple(float(f"{v:.7g}") for v in column) for column in columns)
        return TapStatistics(max(channel_amax), channel_amax, mean_square, mean)
