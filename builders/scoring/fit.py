"""Labelled examples → a ProbabilityCalibration, which turns a scoring model's scores into calibrated probabilities.

Measured scores and hidden states enter; a ProbabilityCalibration leaves, with a report of the figures before and after.
Figures "after" are cross-fitted: each example is evaluated by a fit on other examples. Nothing here starts a server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically
from deepseek_triton.ensemble.protocol.pipelines import SCORER_SUFFIX, model_name
from deepseek_triton.ensemble.scoring.calibration import FILE_NAME, Floats, LinearHead, ProbabilityCalibration, softmax
from deepseek_triton.ensemble.scoring.profile import Normalisation, ScoringProfile

# temperature: one factor. bias: a factor and one bias for each label. contextual: biases measured on texts without
# content, and a fitted temperature. head: a logistic regression on the hidden state instead of the labels' scores.
Method = Literal["temperature", "bias", "contextual", "head"]
METHODS: tuple[Method, ...] = get_args(Method)
CONTENT_FREE = ("N/A", "[MASK]", "...")
NUM_FOLDS = 5
NUM_BINS = 10
MIN_EXAMPLES = 20


class FitError(BuildError):
    """The examples can't be fitted, or the repository can't store the result; the message is one line."""


@dataclass(frozen=True)
class Example:
    """A text and its true label."""

    text: str
    label: str


@dataclass(frozen=True)
class ScoredTexts:
    """The model's outputs for some texts: normalised scores [n, labels], and hidden states [n, hidden]."""

    scores: Floats
    hidden: NDArray[Any]

    def __getitem__(self, rows: NDArray[Any]) -> ScoredTexts:
        return ScoredTexts(self.scores[rows], self.hidden[rows])


def read_examples(path: Path, labels: Sequence[str]) -> list[Example]:
    """Read JSON lines of `{"text": …, "label": …}`.

    Raises:
        FitError: a line is invalid, which the message names, or there are too few examples.
    """
    try:
        # Not splitlines: JSON strings may contain characters, like U+2028, that splitlines takes for line ends.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FitError(f"{path} can't be read: {error}") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            example = Example(values["text"], values["label"])
        except (ValueError, KeyError, TypeError):
            raise FitError(f'{path}:{number} must be {{"text": …, "label": …}}, got {line[:60]!r}') from None
        if not isinstance(example.text, str) or not example.text.strip():
            raise FitError(f"{path}:{number}: text is {example.text!r}, must be text")
        try:
            example.text.encode()
        except UnicodeEncodeError:  # a lone surrogate: half of a pair of \u escapes
            raise FitError(f"{path}:{number}: text must be text that UTF-8 can encode, got {line[:60]!r}") from None
        if example.label not in labels:
            raise FitError(f"{path}:{number}: label is {example.label!r}, must be one of {', '.join(labels)}")
        examples.append(example)
    counts = {label: sum(example.label == label for example in examples) for label in labels}
    if len(examples) < MIN_EXAMPLES or min(counts.values()) < NUM_FOLDS:
        raise FitError(f"{path} holds {counts}: needs at least {MIN_EXAMPLES} examples, and {NUM_FOLDS} of each label")
    return examples


def fit(
    method: Method,
    labels: tuple[str, ...],
    normalisation: Normalisation,
    measured: ScoredTexts,
    truth: NDArray[Any],
    content_free: Floats | None = None,
) -> ProbabilityCalibration:
    """Fit a calibration, and report its figures before and after.

    Args:
        truth: [n] index of each example's label.
        content_free: for contextual, scores [m, labels] of texts without content.
    """
    prior = None if content_free is None else -content_free.mean(axis=0)
    if method == "contextual" and prior is None:
        raise FitError("method contextual needs scores of texts without content")

    def fitted(rows: NDArray[Any]) -> ProbabilityCalibration:
        own, known = measured[rows], truth[rows]
        parts = FITTERS[method](own, known, prior)
        return ProbabilityCalibration(labels, method=method, normalisation=normalisation, report={}, **parts)

    before, after = softmax(measured.scores), np.zeros_like(measured.scores)
    for fold in _folds(truth):
        held_out = measured[fold]
        others = np.setdiff1d(np.arange(len(truth)), fold)
        after[fold] = fitted(others).probabilities(held_out.scores, held_out.hidden)
    report: dict[str, float] = {"examples": len(truth)}
    for name, probabilities in (("before", before), ("after", after)):
        report[f"expected_calibration_error_{name}"] = round(expected_calibration_error(probabilities, truth), 4)
        report[f"negative_log_likelihood_{name}"] = round(negative_log_likelihood(probabilities, truth), 4)
        report[f"accuracy_{name}"] = round(float((probabilities.argmax(axis=1) == truth).mean()), 4)
    parts = FITTERS[method](measured, truth, prior)
    return ProbabilityCalibration(labels, method=method, normalisation=normalisation, report=report, **parts)


def _folds(truth: NDArray[Any]) -> list[NDArray[Any]]:
    """NUM_FOLDS sets of example indices, stratified: each has its share of every label."""
    random = np.random.default_rng(0)
    order = np.concatenate([random.permutation(np.flatnonzero(truth == label)) for label in np.unique(truth)])
    return [order[first::NUM_FOLDS] for first in range(NUM_FOLDS)]


def expected_calibration_error(probabilities: Floats, truth: NDArray[Any], num_bins: int = NUM_BINS) -> float:
    """Mean difference between confidence and accuracy over bins of equal width, weighted by their examples."""
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = (abs(confidence[bins == b].sum() - is_right[bins == b].sum()) for b in range(num_bins))
    return float(sum(gaps) / len(truth))


def negative_log_likelihood(probabilities: Floats, truth: NDArray[Any]) -> float:
    """Mean negative log-likelihood of the true labels, in nats."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-300)).mean())


def write_calibration(repository: Path, name: str, calibration: ProbabilityCalibration) -> Path:
    """Write calibration.json into the newest version of the model's scorer; returns its path.

    Raises:
        FitError: there is no such scorer, or the file can't be written.
    """
    path = newest_version(repository / model_name(name, SCORER_SUFFIX)) / FILE_NAME
    write_atomically(path, calibration.to_json().encode(), FitError)
    return path


def read_profile(repository: Path, name: str) -> ScoringProfile:
    """The profile of the newest version of scoring model `name`.

    Raises:
        FitError: there is no such model, or it was built without labels.
    """
    try:
        profile = ScoringProfile.load(newest_version(repository / model_name(name, SCORER_SUFFIX)))
    except ValueError as error:
        raise FitError(str(error)) from error
    if not profile.labels:
        raise FitError(f"{name} was built without labels: build it again with --labels, a calibration is of its labels")
    return profile


def newest_version(directory: Path) -> Path:
    """The newest version of a model, which Triton serves.

    Raises:
        FitError: the model has no version.
    """
    found = directory.glob("*") if directory.is_dir() else []
    versions = [path for path in found if path.name.isdecimal()]
    if not versions:
        raise FitError(f"{directory} has no version: build the model with --task score first")
    return max(versions, key=lambda path: int(path.name))


def _temperature(scores: Floats, truth: NDArray[Any], biases: Floats) -> float:
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(softmax((scores + biases) / np.exp(log_temperature)), truth)

    return float(np.exp(minimize_scalar(loss, bounds=(-4.0, 6.0), method="bounded").x))


def _fit_temperature(own: ScoredTexts, truth: NDArray[Any], prior: Floats | None) -> dict[str, Any]:
    zeros = np.zeros(own.scores.shape[1])
    return {"temperature": _temperature(own.scores, truth, zeros), "biases": tuple(zeros.tolist())}


def _fit_contextual(own: ScoredTexts, truth: NDArray[Any], prior: Floats | None) -> dict[str, Any]:
    assert prior is not None
    return {"temperature": _temperature(own.scores, truth, prior), "biases": tuple(prior.tolist())}


def _fit_bias(own: ScoredTexts, truth: NDArray[Any], prior: Floats | None) -> dict[str, Any]:
    from scipy.optimize import minimize

    def loss(values: Floats) -> float:
        biases = np.array([0.0, *values[1:]])
        likelihood = negative_log_likelihood(softmax(own.scores / np.exp(values[0]) + biases), truth)
        # A small L2 penalty: separable examples would have no finite optimum without it.
        return likelihood + 1e-4 * float(values @ values)

    found = minimize(loss, np.zeros(own.scores.shape[1]), method="BFGS").x
    temperature = float(np.exp(found[0]))
    # In a ProbabilityCalibration the temperature divides the bias too: (score + bias) / temperature.
    return {"temperature": temperature, "biases": (0.0, *(float(bias) * temperature for bias in found[1:]))}


def _fit_head(own: ScoredTexts, truth: NDArray[Any], prior: Floats | None) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    search = GridSearchCV(model, {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1]}, scoring="neg_log_loss", cv=4)
    scaler, regression = search.fit(own.hidden, truth).best_estimator_
    weights, biases = regression.coef_, regression.intercept_
    if len(weights) == 1:  # with two labels scikit-learn has only the second one's row
        weights, biases = np.stack([0 * weights[0], weights[0]]), np.array([0.0, biases[0]])
    weights = weights / scaler.scale_
    biases = biases - weights @ scaler.mean_
    head = LinearHead(tuple(map(tuple, weights.tolist())), tuple(biases.tolist()))
    return {"temperature": 1.0, "biases": (0.0,) * own.scores.shape[1], "head": head}


FITTERS: dict[Method, Callable[[ScoredTexts, NDArray[Any], Floats | None], dict[str, Any]]] = {
    "temperature": _fit_temperature,
    "bias": _fit_bias,
    "contextual": _fit_contextual,
    "head": _fit_head,
}
