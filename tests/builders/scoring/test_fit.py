"""Fitting calibrations to scores with known probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from deepseek_triton.builders.commands.fitting import measure
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.fit import (
    METHODS,
    FitError,
    ScoredTexts,
    expected_calibration_error,
    fit,
    negative_log_likelihood,
    read_examples,
    read_profile,
    write_calibration,
)
from deepseek_triton.builders.scoring.options import ScoringOptions
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.errors import RequestRejected
from deepseek_triton.ensemble.scoring.calibration import ProbabilityCalibration, softmax
from deepseek_triton.ensemble.scoring.profile import ScoringProfile
from tests.support.checkpoints import make_tokenizer, write_tiny

LABELS = ("a", "b", "c")


def drawn(count: int, temperature: float, biases: tuple[float, ...], seed: int = 0) -> tuple[ScoredTexts, Any]:
    """Scores whose true probabilities are softmax((score + bias) / temperature), and labels drawn from them."""
    random = np.random.default_rng(seed)
    scores = random.normal(0, 4, (count, len(biases)))
    probabilities = softmax((scores + np.array(biases)) / temperature)
    truth = np.array([random.choice(len(biases), p=row) for row in probabilities])
    hidden = np.concatenate([scores + np.array(biases), random.normal(size=(count, 5))], axis=1)
    return ScoredTexts(scores, hidden), truth


def test_a_temperature_is_found_again() -> None:
    measured, truth = drawn(3000, 3.0, (0.0, 0.0, 0.0))
    fitted = fit("temperature", LABELS, "mean", measured, truth)
    assert fitted.temperature == pytest.approx(3.0, rel=0.1) and fitted.biases == (0.0, 0.0, 0.0)
    report = fitted.report
    assert report["expected_calibration_error_before"] > 0.15 > 0.05 > report["expected_calibration_error_after"]
    assert report["negative_log_likelihood_after"] < report["negative_log_likelihood_before"]


@pytest.mark.slow
def test_biases_are_found_again() -> None:
    measured, truth = drawn(3000, 2.0, (0.0, 3.0, -2.0))
    fitted = fit("bias", LABELS, "mean", measured, truth)
    assert fitted.temperature == pytest.approx(2.0, rel=0.1)
    np.testing.assert_allclose(fitted.biases, (0.0, 3.0, -2.0), atol=0.4)
    assert fitted.report["accuracy_after"] > fitted.report["accuracy_before"]


def test_a_prior_is_taken_from_texts_without_content() -> None:
    measured, truth = drawn(3000, 2.0, (0.0, 3.0, -2.0))
    fitted = fit("contextual", LABELS, "mean", measured, truth, np.array([[0.5, -3.0, 2.0], [-0.5, -3.0, 2.0]]))
    assert fitted.biases == (0.0, 3.0, -2.0) and fitted.temperature == pytest.approx(2.0, rel=0.1)
    with pytest.raises(FitError, match="contextual needs scores of texts without content"):
        fit("contextual", LABELS, "mean", measured, truth)


@pytest.mark.slow
@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_head_reads_the_hidden_state(num_labels: int) -> None:
    biases = (0.0, 1.0, -1.0)[:num_labels]
    measured, truth = drawn(600, 1.0, biases)
    useless = ScoredTexts(np.zeros_like(measured.scores), measured.hidden)
    fitted = fit("head", LABELS[:num_labels], "mean", useless, truth)
    assert fitted.head is not None and len(fitted.head.weights) == num_labels
    assert fitted.report["accuracy_after"] > 0.8 > fitted.report["accuracy_before"]
    found = fitted.probabilities(useless.scores, useless.hidden)
    assert negative_log_likelihood(found, truth) < 0.5
    assert ProbabilityCalibration(**{**fitted.__dict__}) == fitted


@pytest.mark.slow
def test_what_is_judged_was_not_fitted_on() -> None:
    """The labels are random: a head that is evaluated on its own training examples would look good."""
    random = np.random.default_rng(0)
    measured = ScoredTexts(np.zeros((60, 2)), random.normal(size=(60, 200)))
    fitted = fit("head", LABELS[:2], "mean", measured, random.integers(0, 2, 60))
    assert fitted.report["accuracy_after"] < 0.7


def test_calibration_error_is_how_far_confidence_is_from_being_right() -> None:
    probabilities = np.array([[0.9, 0.1]] * 10)
    assert expected_calibration_error(probabilities, np.array([0] * 9 + [1])) == pytest.approx(0.0)
    assert expected_calibration_error(probabilities, np.ones(10)) == pytest.approx(0.9)
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0.0


def test_examples_at_fault_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    good = [json.dumps({"text": "x", "label": label}) for label in "ab"] * 15
    odd = '{"text": "one\u2028two", "label": "a"}'
    path.write_text("\r\n".join([odd, *good[1:], ""]), encoding="utf-8-sig")
    examples = read_examples(path, ("a", "b"))
    assert [example.label for example in examples] == ["a", "b"] * 15
    assert examples[0].text == "one\u2028two"
    for line, message in (
        ("{", r"examples.jsonl:1 must be"),
        ('{"text": "x"}', r":1 must be"),
        ('["x"]', r":1 must be"),
        ('{"text": " ", "label": "a"}', r":1: text is ' ', must be text"),
        ('{"text": "\\ud800", "label": "a"}', r":1: text must be text that UTF-8 can encode"),
        ('{"text": "x", "label": "z"}', r":1: label is 'z', must be one of a, b"),
    ):
        path.write_text("\n".join([line, *good]))
        with pytest.raises(FitError, match=message):
            read_examples(path, ("a", "b"))
    path.write_text("\n".join(good[:3]))
    with pytest.raises(FitError, match=r"holds {'a': 2, 'b': 1}: needs at least 20 examples, and 5 of each label"):
        read_examples(path, ("a", "b"))
    with pytest.raises(FitError, match="can't be read"):
        read_examples(tmp_path / "no", ("a", "b"))


@pytest.mark.slow
def test_a_calibration_goes_beside_the_newest_scorer(tmp_path: Path) -> None:
    checkpoint = make_tokenizer(write_tiny(tmp_path / "tiny", vocab_size=320, eos_token_id=319))
    options = BuildOptions(checkpoint, "s", tmp_path / "models", task="score", max_seq_len=32)
    build(options)
    with pytest.raises(FitError, match="s was built without labels: build it again with --labels"):
        read_profile(options.repository, "s")
    build(BuildOptions(**{**options.__dict__, "scoring": ScoringOptions(labels=("a", "b"))}))
    assert read_profile(options.repository, "s").labels == ("a", "b")
    fitted = ProbabilityCalibration(("a", "b"), 2.0, (0.0, 1.0), "bias", "mean", {})
    path = write_calibration(options.repository, "s", fitted)
    assert path == options.repository / "s-scorer" / "2" / "calibration.json"
    assert ProbabilityCalibration.load(path.parent) == fitted
    with pytest.raises(FitError, match="nobody-scorer has no version: build the model with --task score first"):
        read_profile(options.repository, "nobody")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_rarest_label_is_in_every_fold(seed: int) -> None:
    measured, _ = drawn(40, 1.0, (0.0, 0.0), seed)
    truth = np.random.default_rng(seed).permutation([1] * 5 + [0] * 35)
    # Scikit-learn warns, and would then fail, where a fold's own folds lack a label; a warning fails a test here.
    assert fit("head", ("a", "b"), "sum", measured, truth).report["examples"] == 40


def test_an_example_that_the_server_refuses_is_named() -> None:
    class Refusing:
        model = "m"

        def infer(self, *_: object) -> None:
            raise RequestRejected("the prompt has 999 tokens")

    client, texts = cast(BaseClient, Refusing()), [f"text {number}" for number in range(9)]
    with pytest.raises(
        FitError, match="examples 1 to 4, of which the first begins 'text 0': the prompt has 999 tokens"
    ):
        measure(client, ScoringProfile(labels=("a", "b")), texts, chunk=4)


@pytest.mark.slow
def test_every_method_can_be_asked_for() -> None:
    measured, truth = drawn(100, 1.0, (0.0, 0.0))
    for method in METHODS:
        assert fit(method, ("a", "b"), "sum", measured, truth, measured.scores[:2]).method == method
