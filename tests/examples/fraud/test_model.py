"""The fraud model without a server: records, trees, explanations and drift."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.examples.fraud.data.payments import LabelledPayment, make_payments
from deepseek_triton.examples.fraud.data.phrases import MERCHANTS, MESSAGES
from deepseek_triton.examples.fraud.drift import MIN_SHARE, DriftWindow, Reference
from deepseek_triton.examples.fraud.evaluation import evaluate, figures_of
from deepseek_triton.examples.fraud.model import FraudModel, FraudModelError
from deepseek_triton.examples.fraud.records import FEATURES, PaymentRecord, RecordError
from deepseek_triton.examples.fraud.serving.repository import first_layers
from deepseek_triton.examples.fraud.training import TREES, boosted_trees, features_of, train, truth_of
from deepseek_triton.examples.fraud.trees import BoostedTrees
from tests.support.checkpoints import make_tokenizer, write_tiny

RECORD = make_payments(1, 0)[0].record


def changed(**values: Any) -> str:
    return json.dumps(dataclasses.asdict(RECORD) | values)


def test_a_record_survives_json() -> None:
    assert PaymentRecord.from_json(RECORD.to_json()) == RECORD
    assert len(RECORD.features()) == len(FEATURES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the record must be a JSON object"),
        ("[1]", r"must be a JSON object, got \[1\]"),
        ("[" * 4000, "must be a JSON object"),
        (changed(amount=-1), "amount must be a number from 0.01 to 1e"),
        (changed(amount="12"), "amount must be a number"),
        (changed(amount=True), "amount must be a number"),
        (changed(amount=math.nan), "NaN is not JSON"),
        (changed(amount=10**400), "amount must be a number"),
        (changed(hour=24), "hour must be a whole number from 0 to 23, got 24"),
        (changed(hour=3.5), "hour must be a whole number"),
        (changed(is_online=1), "is_online must be true or false, got 1"),
        (changed(merchant=" "), "merchant must be text of 1 to 96 characters"),
        (changed(message="x" * 97), "message must be text of 0 to 96 characters"),
        (changed(message="\ud800"), "message must be text that UTF-8 can encode"),
        (changed(message=None), "message must be text"),
        (changed(more=1), "unknown field 'more'; the fields are amount, "),
        ('{"amount": 1}', "usual_amount is missing"),
        (changed(message="x" * 5000), "the record has 5[0-9]+ bytes, at most 4096 are allowed"),
    ],
)
def test_an_invalid_record_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RecordError, match=message) as told:
        PaymentRecord.from_json(text)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_payments_are_the_same_for_a_seed_and_new_words_are_new() -> None:
    assert make_payments(50, 3) == make_payments(50, 3) != make_payments(50, 4)
    for kind in (*MERCHANTS.values(), *MESSAGES.values()):
        assert not set(kind.known) - {""} & set(kind.new)
    share = np.mean([payment.is_fraud for payment in make_payments(2000, 1)])
    assert 0.03 < share < 0.08


@pytest.fixture(scope="module", autouse=True)
def few_trees() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TREES, "n_estimators", 20)
        yield


@pytest.fixture(scope="module")
def payments() -> list[LabelledPayment]:
    return make_payments(600, 5)


@pytest.fixture(scope="module")
def hidden(payments: list[LabelledPayment]) -> Any:
    """States of which one number knows a little of the truth."""
    states = np.random.default_rng(0).normal(size=(len(payments), 8)).astype(np.float32)
    states[:, 3] += 2 * truth_of(payments)
    return states


@pytest.fixture(scope="module")
def model(payments: list[LabelledPayment], hidden: Any) -> FraudModel:
    return train(payments, hidden)


@pytest.mark.slow
def test_the_trees_are_scikit_learns(payments: list[LabelledPayment]) -> None:
    features, truth = features_of(payments), truth_of(payments)
    theirs = boosted_trees().fit(features, truth)
    ours = BoostedTrees.from_sklearn(theirs)
    np.testing.assert_allclose(ours.log_odds(features), theirs.decision_function(features), atol=1e-9)
    again = BoostedTrees.from_dict(json.loads(json.dumps(ours.to_dict())))
    np.testing.assert_array_equal(again.log_odds(features), ours.log_odds(features))


def test_an_explanation_sums_to_the_decision(payments: list[LabelledPayment], hidden: Any, model: FraudModel) -> None:
    inputs = model.inputs(features_of(payments), hidden)
    probabilities = model.probabilities(inputs)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    for i, told in enumerate(model.explain(inputs)):
        assert told.base + sum(told.contributions.values()) == pytest.approx(told.log_odds, abs=1e-9)
        assert told.probability == pytest.approx(probabilities[i, 1], abs=1e-9)
        sizes = [abs(value) for value in told.contributions.values()]
        assert sizes == sorted(sizes, reverse=True)


def test_an_input_that_no_tree_splits_contributes_nothing(payments: list[LabelledPayment]) -> None:
    features, truth = features_of(payments), truth_of(payments)
    constant = np.column_stack([features, np.zeros(len(features))])
    trees = BoostedTrees.from_sklearn(boosted_trees().fit(constant, truth))
    assert not trees.contributions(constant)[:, -1].any()
    assert trees.contributions(constant)[:, :-1].any()


def test_a_model_survives_its_file(
    model: FraudModel, payments: list[LabelledPayment], hidden: Any, tmp_path: Path
) -> None:
    model.save(tmp_path)
    loaded = FraudModel.load(tmp_path)
    inputs = model.inputs(features_of(payments), hidden)
    np.testing.assert_array_equal(loaded.probabilities(inputs), model.probabilities(inputs))
    assert loaded.reference == model.reference
    with pytest.raises(FraudModelError, match="the hidden state has 9 numbers, the head 8"):
        model.inputs(features_of(payments[:1]), np.zeros((1, 9)))
    path = tmp_path / "fraud.json"
    for damaged in ("", "{}", path.read_text().replace('"format": 1', '"format": 2')):
        path.write_text(damaged)
        with pytest.raises(FraudModelError, match="train again"):
            FraudModel.load(tmp_path)


def test_drift_is_small_among_alike_records_and_large_where_one_input_moves() -> None:
    random = np.random.default_rng(1)
    reference = Reference.of(("number", "flag"), np.column_stack([random.normal(size=4000), random.random(4000) < 0.3]))
    window = DriftWindow(reference, size=1000)
    assert window.psi() == {}
    window.add(np.column_stack([random.normal(size=1500), random.random(1500) < 0.3]))
    assert window.num_records == 1000
    assert max(window.psi().values()) < 0.1
    window.add(np.column_stack([random.normal(1.0, size=1000), random.random(1000) < 0.3]))
    assert window.psi()["number"] > 0.25 > 0.1 > window.psi()["flag"]


def test_psi_is_the_formulas() -> None:
    reference = Reference(("x",), ((0.5,),), ((0.8, 0.2),))
    found = reference.psi(np.array([[0.0]] * 6 + [[1.0]] * 4))["x"]
    assert found == pytest.approx((0.6 - 0.8) * math.log(0.6 / 0.8) + (0.4 - 0.2) * math.log(0.4 / 0.2))
    assert reference.psi(np.array([[0.0]] * 5))["x"] == pytest.approx(
        (1 - 0.8) * math.log(1 / 0.8) + (MIN_SHARE - 0.2) * math.log(MIN_SHARE / 0.2)
    )


@pytest.mark.slow
def test_figures_and_their_intervals() -> None:
    random = np.random.default_rng(2)
    truth = (random.random(1000) < 0.2).astype(int)
    good, bad = 3.0 * truth + random.normal(size=1000), random.normal(size=1000)
    figures, gains = evaluate({"good": good, "bad": bad}, truth, "good", num_resamples=50)
    assert figures["good"]["roc_auc"].low < figures["good"]["roc_auc"].value < figures["good"]["roc_auc"].high
    assert gains["bad"]["pr_auc"].is_above_zero and not figures_of(bad, truth)["roc_auc"] > 0.6
    honest = figures_of(np.full(1000, math.log(0.25)), truth)
    assert honest["expected_calibration_error"] < 0.2


def test_the_first_layers_are_a_checkpoint_of_their_own(tmp_path: Path) -> None:
    whole = make_tokenizer(write_tiny(tmp_path / "whole", vocab_size=320, eos_token_id=319, num_hidden_layers=3))
    (tmp_path / "first").mkdir()
    first_layers(whole, 2, tmp_path / "first")
    left, parent = open_checkpoint(tmp_path / "first"), open_checkpoint(whole)
    assert left.spec == dataclasses.replace(parent.spec, num_layers=2)
    for name in left.spec.tensor_shapes():
        assert np.array_equal(left.read(name), parent.read(name)), name
    for count in (0, 4):
        with pytest.raises(BuildError, match=f"--layers must be from 1 to 3, got {count}"):
            first_layers(whole, count, tmp_path / "none")
