"""Labelled payments and their texts' hidden states → a FraudModel. scikit-learn fits, here alone.

What the trees learn from, and what scale, bias, threshold and reference are fitted on, is cross-fitted: the head's
score of a payment comes from a head, and the trees' score from trees, that had not seen this payment. Otherwise the
trees would trust the text's score more than it deserves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.features import read_features
from deepseek_triton.examples.fraud.data.payments import LabelledPayment
from deepseek_triton.examples.fraud.drift import SCORE, Reference
from deepseek_triton.examples.fraud.model import FraudModel
from deepseek_triton.examples.fraud.records import FEATURES, TEXT_FEATURE
from deepseek_triton.examples.fraud.trees import BoostedTrees

NUM_FOLDS = 5
HEAD_STRENGTHS = (1e-4, 1e-3, 1e-2)  # C of the logistic regression; the best by cross-validation is taken
TREES: dict[str, Any] = {"n_estimators": 150, "max_depth": 3, "learning_rate": 0.05, "subsample": 0.7}
TEXTS_PER_REQUEST = 16
FALSE_POSITIVES = 0.01  # share of legitimate training payments above the threshold
SEED = 0


def hidden_states(client: BaseClient, texts: Sequence[str]) -> NDArray[np.float32]:
    """The language model's hidden state of each text [n, hidden]; equal texts are asked about once.

    client: of the scoring model. Raises `ClientError`.
    """
    different = list(dict.fromkeys(texts))
    states: dict[str, tuple[float, ...]] = {}
    for start in range(0, len(different), TEXTS_PER_REQUEST):
        asked = different[start : start + TEXTS_PER_REQUEST]
        states |= {text: own.hidden for text, own in zip(asked, read_features(client, asked), strict=True)}
    return np.array([states[text] for text in texts], np.float32)


def features_of(payments: Sequence[LabelledPayment]) -> NDArray[Any]:
    """[n, FEATURES]."""
    return np.array([payment.record.features() for payment in payments])


def truth_of(payments: Sequence[LabelledPayment]) -> NDArray[Any]:
    """[n]: 1 for fraud."""
    return np.array([int(payment.is_fraud) for payment in payments])


def train(payments: Sequence[LabelledPayment], hidden: NDArray[Any]) -> FraudModel:
    """Fit on `payments` and their texts' hidden states [n, hidden]."""
    features, truth = features_of(payments), truth_of(payments)
    head = text_head()
    text = cross_fitted(head, hidden, truth)
    scaler, regression = head.fit(hidden, truth).best_estimator_
    weights = regression.coef_[0] / scaler.scale_
    bias = float(regression.intercept_[0] - weights @ scaler.mean_)
    inputs = np.column_stack([features, text])
    unseen = cross_fitted(boosted_trees(), inputs, truth)
    fitted = BoostedTrees.from_sklearn(boosted_trees().fit(inputs, truth))
    scale, offset = platt(unseen, truth)
    scores = scale * unseen + offset
    threshold = float(1 / (1 + np.exp(-np.quantile(scores[truth == 0], 1 - FALSE_POSITIVES))))
    reference = Reference.of((*FEATURES, TEXT_FEATURE, SCORE), np.column_stack([inputs, scores]))
    return FraudModel(weights, bias, fitted, scale, offset, threshold, reference)


def text_head() -> Any:
    """An unfitted logistic regression on hidden states."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return GridSearchCV(model, {"logisticregression__C": list(HEAD_STRENGTHS)}, scoring="neg_log_loss", cv=3)


def boosted_trees() -> Any:
    """Unfitted boosted trees, of scikit-learn."""
    from sklearn.ensemble import GradientBoostingClassifier

    return GradientBoostingClassifier(**TREES, random_state=SEED)


def cross_fitted(model: Any, inputs: Any, truth: NDArray[Any]) -> NDArray[Any]:
    """Each record's log-odds [n], of a copy of `model` that was fitted on other records."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=SEED)
    scores: NDArray[Any] = cross_val_predict(model, inputs, truth, cv=folds, method="decision_function")
    return scores


def platt(scores: NDArray[Any], truth: NDArray[Any]) -> tuple[float, float]:
    """scale, bias: the logistic regression of the truth on log-odds of unseen records (Platt's calibration)."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=1e3).fit(scores[:, None], truth)
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
