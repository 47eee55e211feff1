"""Converts labels' scores to calibrated probabilities; reads and writes calibration.json.

A score is a label's normalised log probability. The probabilities are softmax((score + bias) / temperature). The biases
remove the model's prior for the labels (measured on texts without content, or fitted); the temperature corrects its
confidence. A linear head on the model's hidden state may replace the scores. This module doesn't know how the values
were fitted.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.scoring.profile import Normalisation

FILE_NAME = "calibration.json"
FORMAT = 1
Floats = NDArray[np.float64]


class ProbabilityCalibrationError(ValueError):
    """calibration.json is unreadable or doesn't fit the model; one line."""


@dataclass(frozen=True)
class LinearHead:
    """A linear head on the hidden state: weights [labels, hidden], biases [labels]."""

    weights: tuple[tuple[float, ...], ...]
    biases: tuple[float, ...]

    def scores(self, hidden: NDArray[Any]) -> Floats:
        """hidden [n, hidden] → scores [n, labels]."""
        scores: Floats = np.asarray(hidden, np.float64) @ np.array(self.weights).T + np.array(self.biases)
        return scores


@dataclass(frozen=True)
class ProbabilityCalibration:
    """The calibration of the scores of `labels`.

    biases: one for each label, in nats. method: the fitting method. normalisation: that of the scores used for fitting.
    report: results of fitting: number of examples, expected calibration error and negative log-likelihood before and
    after. head: if given, computes the scores from the hidden state.
    """

    labels: tuple[str, ...]
    temperature: float
    biases: tuple[float, ...]
    method: str
    normalisation: Normalisation
    report: dict[str, float]
    head: LinearHead | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ProbabilityCalibrationError(f"temperature is {self.temperature!r}, must be finite and above 0")
        if len(self.biases) != len(self.labels) or not all(map(math.isfinite, self.biases)):
            raise ProbabilityCalibrationError(
                f"biases is {self.biases!r}, must be one finite number for each of {self.labels!r}"
            )
        if self.head is not None and len(self.head.weights) != len(self.labels):
            raise ProbabilityCalibrationError(f"head has {len(self.head.weights)} rows for {len(self.labels)} labels")

    def probabilities(self, scores: NDArray[Any], hidden: NDArray[Any] | None = None) -> Floats:
        """scores [n, labels], hidden [n, hidden] → probabilities [n, labels]."""
        if self.head is not None:
            if hidden is None:
                raise ProbabilityCalibrationError("a calibration with a head needs the hidden state")
            scores = self.head.scores(hidden)
        return softmax((np.asarray(scores, np.float64) + np.array(self.biases)) / self.temperature)

    def to_json(self) -> str:
        """Return the text of calibration.json."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=None if self.head else 2) + "\n"

    @classmethod
    def load(cls, directory: Path) -> ProbabilityCalibration | None:
        """Read `directory`'s calibration.json; None if there is none.

        Raises:
            ProbabilityCalibrationError: the file is damaged or has another format.
        """
        path = directory / FILE_NAME
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ProbabilityCalibrationError(f"{path} can't be read: {error}; remove it, or fit it again") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names or values["format"] != FORMAT:
            raise ProbabilityCalibrationError(
                f"{path} is not a calibration of format {FORMAT}; remove it, or fit it again"
            )
        try:
            stored = values["head"]
            head = stored and LinearHead(tuple(map(tuple, stored["weights"])), tuple(stored["biases"]))
            tuples = {"labels": tuple(values["labels"]), "biases": tuple(map(float, values["biases"])), "head": head}
            return cls(**{**values, **tuples})
        except (KeyError, TypeError, ValueError) as error:
            raise ProbabilityCalibrationError(f"{path} is damaged: {error}; remove it, or fit it again") from error


def label_scores(
    log_probs: NDArray[Any], target_labels: NDArray[Any], num_labels: int, normalisation: Normalisation
) -> tuple[Floats, Floats]:
    """Return (sums, scores), each [labels], of the labels' log probabilities.

    Args:
        log_probs: one for each target token, [targets].
        target_labels: index of each target's label, [targets]; -1 is padding.
        num_labels: number of labels.
        normalisation: of the scores.
    """
    is_real = target_labels >= 0
    labels = target_labels[is_real]
    sums = np.bincount(labels, np.asarray(log_probs, np.float64)[is_real], num_labels).astype(np.float64)
    counts = np.bincount(labels, minlength=num_labels)
    return sums, sums / np.maximum(counts, 1) if normalisation == "mean" else sums


def softmax(values: Floats) -> Floats:
    """Return the softmax over the last axis."""
    exponents = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))
