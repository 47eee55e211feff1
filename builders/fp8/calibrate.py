"""Checkpoint + windows of text → Calibration: statistics of every linear layer's input.

The float model runs layer by layer over the windows, and only running statistics of each input are kept. The result is
one JSON file that can be read, compared and used again. It holds the windows too, because compensation runs on the same
text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.files.hub_cache import model_name
from deepseek_triton.builders.checkpoint.read_ahead import TensorPrefetch
from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.forward.layer import layer_runner
from deepseek_triton.builders.fp8.forward.layer_session import Ids, embed
from deepseek_triton.builders.fp8.journal import Section
from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays, best_arrays
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically
from deepseek_triton.ensemble.decoder.moe import CHOSEN, MixtureOfExperts
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

MIN_TOKENS = 128  # with fewer the measured ranges are unreliable
FORMAT = 1
# Progress callback: name of the current step, units done, units in all (the step chooses the unit).
Report = Callable[[str, int, int], None]


class CalibrationError(BuildError):
    """The calibration text or the activation ranges can't be used."""


@dataclass(frozen=True)
class TapStatistics:
    """Statistics of one linear layer's input over all windows.

    amax: largest magnitude. channel_amax: largest magnitude of each channel. mean_square: E[x²] of each channel.
    mean: E[x] of each channel.
    """

    amax: float
    channel_amax: tuple[float, ...]
    mean_square: tuple[float, ...]
    mean: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """Statistics of every tap (`model.layers.N.TAP`, see `ModelSpec.taps`), and the text that they come from.

    windows: token ids, each tuple one sequence. sources: names of the texts. experts: how many tokens each expert of a
    layer got, by the layer's prefix.
    """

    model: str
    sources: tuple[str, ...]
    windows: tuple[tuple[int, ...], ...]
    taps: dict[str, TapStatistics]
    experts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def window_arrays(self) -> list[Ids]:
        """The windows as arrays [seq_len] int64."""
        return [np.asarray(window, np.int64) for window in self.windows]

    @property
    def max_window_len(self) -> int:
        """Tokens in the longest window."""
        return max(map(len, self.windows))

    def digest(self) -> str:
        """SHA-256 of all of it."""
        return sha256(json.dumps(self._to_dict(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        text = json.dumps({"format": FORMAT, **self._to_dict()}, separators=(",", ":"))
        write_atomically(path, text.replace('"model.layers.', '\n"model.layers.').encode(), CalibrationError)

    def _to_dict(self) -> dict[str, Any]:
        """Without experts where the model has none."""
        return {name: value for name, value in asdict(self).items() if name != "experts" or value}

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CalibrationError: the file can't be read, or `save` didn't write it.
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
            experts = {layer: tuple(map(int, counts)) for layer, counts in values.get("experts", {}).items()}
            calibration = cls(values["model"], tuple(values["sources"]), windows, taps, experts)
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
    arrays: Arrays | None = None,
    section: Section | None = None,
) -> Calibration:
    """Run the float model over the windows and record each linear layer's input.

    Args:
        checkpoint: every read counts in its digest, so open the checkpoint again for the build.
        windows: token ids [seq_len] each.
        sources: names of the texts, for the file.
        arrays: where the layers are computed; None: the GPU where torch sees one, else the processor.
        section: of the journal: what a killed build had measured; None: nothing is kept.

    Raises:
        CalibrationError: there are too few tokens, a token is outside the vocabulary, or a layer's input has NaN or
            infinite values.
    """
    spec, here = checkpoint.spec, arrays or best_arrays()
    ids = check_windows(windows, spec.vocab_size)
    longest = max(map(len, ids))
    read_names = [name for name in spec.tensor_shapes() if name.startswith(("model.embed_tokens.", "model.layers."))]
    taps: dict[str, TapStatistics] = {}
    counts: dict[str, tuple[int, ...]] = {}
    with TensorPrefetch(checkpoint.read, read_names) as ahead:
        hidden = [here.put(window) for window in embed(ahead.read("model.embed_tokens.weight"), ids)]
        done, kept = 0, section or Section()
        if (state := kept.load_windows("hidden")) is not None:
            done, hidden = int(state[1]), list(map(here.put, state[0]))
        for layer in range(spec.num_layers):
            report("calibrate", layer, spec.num_layers)
            prefix, names = layer_prefix(layer), tuple(tap.value for tap in spec.taps(layer))
            if layer < done:
                loaded = _load_taps(kept, layer)
                taps |= loaded[0]
                counts |= {prefix: loaded[1]} if loaded[1] else {}
                for name in spec.layer_shapes(layer):
                    ahead.read(prefix + name)
                continue
            weights = {prefix + name: ahead.read(prefix + name) for name in spec.layer_shapes(layer)}
            running = {name: _Running(here) for name in names}
            num_experts = num_experts_of(spec, layer)
            tokens = np.zeros(num_experts, np.int64)
            outputs = (*names, CHOSEN) if num_experts else names
            with layer_runner(spec, layer, weights.__getitem__, here, max_seq_len=longest, outputs=outputs) as runner:
                for i, window in enumerate(hidden):
                    hidden[i], *values = runner.run(window, outputs)
                    for name, value in zip(outputs, values, strict=True):
                        if name == CHOSEN:
                            tokens += np.bincount(value.reshape(-1), minlength=num_experts)
                        else:
                            running[name].add(value)
            of_layer = {prefix + name: statistics.result(prefix + name) for name, statistics in running.items()}
            taps |= of_layer
            counts |= {prefix: tuple(map(int, tokens))} if num_experts else {}
            _save_taps(kept, layer, of_layer, tokens)
            kept.save_windows("hidden", list(map(here.get, hidden)), np.array(layer + 1))
    report("calibrate", spec.num_layers, spec.num_layers)
    stored = tuple(tuple(int(token) for token in window) for window in ids)
    return Calibration(model_name(checkpoint.path), tuple(sources), stored, taps, counts)


def num_experts_of(spec: ModelSpec, layer: int) -> int:
    """How many experts a layer's router chooses from; 0: it has none."""
    return next((p.options.num_experts for p in spec.parts(layer) if isinstance(p, MixtureOfExperts)), 0)


def _save_taps(section: Section, layer: int, taps: Mapping[str, TapStatistics], tokens: NDArray[np.int64]) -> None:
    rows = {name: np.array([tap.channel_amax, tap.mean_square, tap.mean]) for name, tap in taps.items()}
    section.save(f"layer-{layer}", {**rows, CHOSEN: tokens} if len(tokens) else rows)


def _load_taps(section: Section, layer: int) -> tuple[dict[str, TapStatistics], tuple[int, ...]]:
    """The statistics of a layer, and how many tokens each of its experts got."""
    rows = section.load(f"layer-{layer}")
    if rows is None:
        raise CalibrationError("the journal of a killed build lacks a layer; remove its directory and build again")
    tokens = tuple(map(int, rows.pop(CHOSEN, ())))
    taps = {
        name: TapStatistics(float(amax.max()), *map(_floats, (amax, square, mean)))
        for name, (amax, square, mean) in rows.items()
    }
    return taps, tokens


def _floats(row: NDArray[Any]) -> tuple[float, ...]:
    return tuple(map(float, row))


def check_windows(windows: Sequence[Sequence[int] | NDArray[Any]], vocab_size: int) -> list[Ids]:
    """The windows as arrays [seq_len] int64; empty ones are left out.

    Raises:
        CalibrationError: there are too few tokens, or one is outside the vocabulary.
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
    """Running statistics of one input: maximum, sum of squares and sum of each channel."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays, self._count = arrays, 0
        self._amax: NDArray[Any] = np.zeros(1)
        self._square: NDArray[Any] = np.zeros(1)
        self._sum: NDArray[Any] = np.zeros(1)

    def add(self, rows: Array) -> None:
        """rows [seq_len, channels]"""
        arrays, xp = self._arrays, self._arrays.xp
        with np.errstate(all="ignore"):  # `result` says whether all is finite
            exact = arrays.double(rows)
            self._amax = np.maximum(self._amax, arrays.get(xp.amax(xp.abs(rows), 0)))
            self._square = self._square + arrays.get(xp.sum(exact * exact, 0))
            self._sum = self._sum + arrays.get(xp.sum(exact, 0))
        self._count += len(rows)

    def result(self, name: str) -> TapStatistics:
        check_finite(name, np.concatenate([self._amax, self._square, self._sum]))
        columns = (self._amax, self._square / self._count, self._sum / self._count)
        channel_amax, mean_square, mean = (tuple(float(f"{v:.7g}") for v in column) for column in columns)
        return TapStatistics(max(channel_amax), channel_amax, mean_square, mean)
