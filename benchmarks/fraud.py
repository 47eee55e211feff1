"""Fraud screening as the scoring task: a small language model against a majority vote and a logistic regression.

Every judge sees the same held-out payments (benchmarks/payments.py). The language model is asked through a running
tritonserver: with the prompt alone, with examples in the prompt, calibrated, and with a linear head on its hidden state
that was fitted on the same training records as the logistic regression.
    python -m benchmarks.fraud [--train 600] [--test 240]
writes benchmarks/results/fraud-prompts.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe
from benchmarks.payments import LABELS, Payment, make_payments
from benchmarks.weights import smollm2
from deepseek_triton.builders.commands.fitting import measure
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.fit import Method, ScoredTexts, expected_calibration_error, fit
from deepseek_triton.builders.scoring.options import ScoringOptions
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.scoring.calibration import softmax
from deepseek_triton.ensemble.server.tritonserver import TritonServer

RESULTS = Path(__file__).parent / "results"
NAME = "fraud"
SEED = 20261124
ZERO_SHOT = """\
A card payment is screened for fraud.

Payment: {text}
This payment is"""
FEW_SHOT_EXAMPLES = 4
FEW_SHOT_TRAIN = 60  # training records to fit the bias on; each takes half a second
Probabilities = NDArray[Any]


def few_shot(examples: Sequence[Payment]) -> str:
    """The prompt: some training records with their labels, then the question."""
    shown = "\n\n".join(f"Payment: {payment.text()}\nThis payment is {payment.label}" for payment in examples)
    return ZERO_SHOT.replace("Payment:", f"{shown}\n\nPayment:", 1)


def judge(probabilities: Probabilities, truth: NDArray[Any]) -> dict[str, float]:
    """Quality of probabilities [n, 2]; fraud is the positive class, at a threshold of one half."""
    from sklearn.metrics import precision_score, recall_score, roc_auc_score

    found = probabilities[:, 1] > 0.5
    return {
        "precision": round(float(precision_score(truth, found, zero_division=0)), 4),
        "recall": round(float(recall_score(truth, found)), 4),
        "auc": round(float(roc_auc_score(truth, probabilities[:, 1])), 4),
        "accuracy": round(float((found == truth).mean()), 4),
        "expected_calibration_error": round(expected_calibration_error(probabilities, truth), 4),
    }


def baselines(train: Sequence[Payment], test: Sequence[Payment]) -> dict[str, Probabilities]:
    """Probabilities [n, 2] of judges without a language model."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    truth = np.array([payment.is_fraud for payment in train])
    table = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    table.fit([payment.fields() for payment in train], truth)
    share = truth.mean()
    return {
        "majority": np.tile([1 - share, share], (len(test), 1)),
        "logistic regression on the fields": table.predict_proba([payment.fields() for payment in test]),
    }


def through_triton(template: str, train: Sequence[Payment], test: Sequence[Payment]) -> tuple[ScoredTexts, ScoredTexts]:
    """The model's scores of both sets, from a server that is started for it."""
    with tempfile.TemporaryDirectory() as directory:
        repository = Path(directory) / "models"
        scoring = ScoringOptions(template=template, labels=LABELS)
        build(BuildOptions(smollm2(), NAME, repository, task="score", max_seq_len=1024, scoring=scoring))
        with (
            TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server,
            GrpcClient(server.grpc_url, NAME) as client,
        ):
            profile = scoring.profile(1024, is_plan=False)
            return tuple(measure(client, profile, [payment.text() for payment in part]) for part in (train, test))  # type: ignore[return-value]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--train", type=int, default=600, help="training records")
    parser.add_argument("--test", type=int, default=240, help="held-out records")
    arguments = parser.parse_args(argv)
    train, test = make_payments(arguments.train, SEED), make_payments(arguments.test, SEED + 1)
    truth, known = (np.array([payment.is_fraud for payment in part], int) for part in (test, train))

    judges = baselines(train, test)
    kinds = [[payment for payment in train if payment.is_fraud == is_fraud] for is_fraud in (True, False)]
    few = [kinds[i % 2][i // 2] for i in range(FEW_SHOT_EXAMPLES)]  # in turn
    for name, template, num_train in (
        ("zero-shot", ZERO_SHOT, len(train)),
        ("few-shot", few_shot(few), min(FEW_SHOT_TRAIN, len(train))),
    ):
        print(f"asking SmolLM2-135M, {name}", flush=True)
        seen, asked = through_triton(template, train[:num_train], test)
        judges[f"SmolLM2-135M {name}"] = softmax(asked.scores)
        methods: list[Method] = ["bias"] if name == "few-shot" else ["bias", "head"]
        for method in methods:
            fitted = fit(method, LABELS, "mean", seen, known[:num_train])
            judges[f"SmolLM2-135M {name}, {method}"] = fitted.probabilities(asked.scores, asked.hidden)
    figures = {name: judge(probabilities, truth) for name, probabilities in judges.items()}
    result = {
        "machine": describe(),
        "model": "SmolLM2-135M-Instruct, float32",
        "records": {"train": len(train), "test": len(test), "fraud_in_test": round(float(truth.mean()), 4)},
        "seed": SEED,
        "templates": {"zero-shot": ZERO_SHOT, "few-shot": few_shot(few)},
        "judges": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fraud-prompts.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    columns = list(next(iter(figures.values())))
    print(f"{'':40}" + "".join(f"{column[:12]:>13}" for column in columns))
    for name, values in figures.items():
        print(f"{name:40}" + "".join(f"{values[column]:13.3f}" for column in columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
