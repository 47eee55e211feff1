"""How good judges of payments are, on records that none of them was fitted on, with bootstrap confidence intervals.

Probabilities and truth enter, figures leave. A difference of two judges has an interval of its own, of the same
resampled records: their intervals may overlap where their difference is sure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.examples.fraud.data.payments import LabelledPayment
from deepseek_triton.examples.fraud.training import boosted_trees, cross_fitted, features_of, platt, truth_of

Floats = NDArray[np.float64]
NUM_RESAMPLES = 500
CONFIDENCE = 0.95
FALSE_POSITIVES = 0.01
NUM_BINS = 10


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0


def figures_of(log_odds: Floats, truth: NDArray[Any]) -> dict[str, float]:
    """The figures of one judge: log-odds [n] and the truth [n].

    recall_at_1_percent_fpr: the share of fraud found where one in a hundred legitimate payments is stopped.
    expected_calibration_error: over NUM_BINS bins of equally many records.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    false, true, _ = roc_curve(truth, log_odds)
    probability = 1 / (1 + np.exp(-log_odds))
    bins = np.array_split(np.argsort(probability), NUM_BINS)
    gaps = [abs(float(probability[own].sum() - truth[own].sum())) for own in bins]
    return {
        "pr_auc": float(average_precision_score(truth, log_odds)),
        "roc_auc": float(roc_auc_score(truth, log_odds)),
        "recall_at_1_percent_fpr": float(true[false <= FALSE_POSITIVES].max()),
        "expected_calibration_error": sum(gaps) / len(truth),
    }


def evaluate(
    judges: Mapping[str, Floats], truth: NDArray[Any], reference: str, num_resamples: int = NUM_RESAMPLES
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Return each judge's figures, and the differences of `reference`'s from every other's.

    judges: name → log-odds [n] of the records whose truth is `truth` [n].
    """
    random = np.random.default_rng(0)
    draws = [_draw(truth, random) for _ in range(num_resamples)]
    whole = {name: figures_of(scores, truth) for name, scores in judges.items()}
    drawn = {name: [figures_of(scores[rows], truth[rows]) for rows in draws] for name, scores in judges.items()}

    def interval(of: Callable[[str, int | None], float]) -> Interval:
        return _interval(of("", None), [of("", i) for i in range(num_resamples)])

    def value(name: str, figure: str, i: int | None) -> float:
        return (whole[name] if i is None else drawn[name][i])[figure]

    names = list(next(iter(whole.values())))
    figures = {
        name: {figure: interval(lambda _, i, n=name, f=figure: value(n, f, i)) for figure in names}  # type: ignore[misc]
        for name in judges
    }
    gains = {
        name: {
            figure: interval(lambda _, i, n=name, f=figure: value(reference, f, i) - value(n, f, i))  # type: ignore[misc]
            for figure in names
        }
        for name in judges
        if name != reference
    }
    return figures, gains


class Baselines:
    """Judges without a language model, fitted on `payments`.

    Each is calibrated as the served model is: log-odds of payments that it hadn't seen, through `platt`.
    """

    def __init__(self, payments: Sequence[LabelledPayment]) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        features, truth, texts = features_of(payments), truth_of(payments), _texts(payments)
        words = cross_fitted(bag_of_words(), texts, truth)
        self._words = bag_of_words().fit(texts, truth)
        with_words = np.column_stack([features, words])
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        self._fitted = {
            "logistic regression, fields": (_Calibrated(regression, features, truth), False),
            "gradient boosting, fields": (_Calibrated(boosted_trees(), features, truth), False),
            "logistic regression, fields and bag of words": (_Calibrated(regression, with_words, truth), True),
            "gradient boosting, fields and bag of words": (_Calibrated(boosted_trees(), with_words, truth), True),
        }

    def log_odds(self, payments: Sequence[LabelledPayment]) -> dict[str, Floats]:
        """Judge → log-odds [n]."""
        features = features_of(payments)
        words = self._words.decision_function(_texts(payments))
        with_words = np.column_stack([features, words])
        return {name: own.log_odds(with_words if takes else features) for name, (own, takes) in self._fitted.items()}


class _Calibrated:
    """A copy of a classifier, fitted and calibrated."""

    def __init__(self, model: Any, inputs: NDArray[Any], truth: NDArray[Any]) -> None:
        from sklearn.base import clone

        self._scale, self._bias = platt(cross_fitted(model, inputs, truth), truth)
        self._model = clone(model).fit(inputs, truth)

    def log_odds(self, inputs: NDArray[Any]) -> Floats:
        scores: Floats = self._scale * self._model.decision_function(inputs) + self._bias
        return scores


def bag_of_words() -> Any:
    """An unfitted logistic regression on the texts' words and pairs of words (TF-IDF)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    return GridSearchCV(model, {"logisticregression__C": [0.1, 1, 10, 100]}, scoring="neg_log_loss", cv=3)


def _texts(payments: Sequence[LabelledPayment]) -> list[str]:
    return [payment.record.text() for payment in payments]


def _draw(truth: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    """Rows drawn with replacement, as many of each class as there are: a figure needs both."""
    parts = [np.flatnonzero(truth == kind) for kind in (0, 1)]
    return np.concatenate([random.choice(part, len(part)) for part in parts])


def _interval(value: float, drawn: Sequence[float]) -> Interval:
    beyond = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, [beyond, 100 - beyond])
    return Interval(value, float(low), float(high))
