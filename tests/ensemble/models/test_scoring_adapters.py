"""The scoring model's adapters on a fake of Triton's Python backend, one after the other as the ensemble runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.runners.scoring import RowScores
from deepseek_triton.ensemble.models.tensors import NUMPY_DTYPES
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.scoring.calibration import ProbabilityCalibration
from deepseek_triton.ensemble.scoring.profile import ScoringProfile
from deepseek_triton.ensemble.scoring.rows import ScoreRow
from tests.ensemble.models.test_adapters import Request, Response, Tensor, adapter  # noqa: F401  # a fixture
from tests.support.checkpoints import make_tokenizer

Load = Callable[[str], ModuleType]
LABELS = ("no", "yes")


class FakeScoringRunner:
    """A token's log-probability is minus its id over a hundred; remembers its batches."""

    vocab_size, max_seq_len = 320, 64

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def score(self, rows: Sequence[ScoreRow], *, with_log_probs: bool = True) -> list[RowScores]:
        self.batches.append([len(row) for row in rows])
        log_probs = [(-row.target_ids / 100).astype(np.float32)[: None if with_log_probs else 0] for row in rows]
        return [RowScores(own, np.full(3, len(row), np.float32)) for own, row in zip(log_probs, rows, strict=True)]


def directory_with(tmp_path: Path, **changes: Any) -> dict[str, str]:
    """A model directory, as Triton names it."""
    version = make_tokenizer(tmp_path / "1")
    ScoringProfile(**{"labels": LABELS, "max_seq_len": 64, **changes}).save(version)
    more = {"model_name": "m-tokenizer", "model_config": "{}"}
    return {"model_repository": str(tmp_path), "model_version": "1", **more}


def strings(spec: contract.TensorSpec, *rows: Sequence[str]) -> Tensor:
    values = [[text.encode() for text in row] for row in rows]
    return Tensor(spec.name, np.array(values, np.object_))


def model(module: ModuleType, arguments: dict[str, str]) -> Any:
    made = module.TritonPythonModel()
    made.initialize(arguments)
    return made


@pytest.fixture
def parts(
    adapter: Load,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[Any, Any, Any, FakeScoringRunner]]:
    def make(**changes: Any) -> tuple[Any, Any, Any, FakeScoringRunner]:
        arguments, runner = directory_with(tmp_path, **changes), FakeScoringRunner()
        engine = adapter("score_engine")
        monkeypatch.setattr(engine, "load_scoring_runner", lambda directory, settings: runner)
        tokenizer, scorer = adapter("score_tokenizer"), adapter("scorer")
        return model(tokenizer, arguments), model(engine, arguments), model(scorer, arguments), runner

    return make


def forward(tensors: dict[str, Any], specs: Sequence[contract.TensorSpec]) -> Request:
    return Request(*(Tensor(spec.name, tensors[spec.name]) for spec in specs))


def run_all(parts: tuple[Any, Any, Any, Any], *requests: Request) -> list[Response]:
    tokenizer, engine, scorer, _ = parts
    rows = [response.tensors for response in tokenizer.execute(list(requests))]
    scored = [r.tensors for r in engine.execute([forward(row, contract.SCORE_ENGINE.inputs) for row in rows])]
    joined = [{**row, **own} for row, own in zip(rows, scored, strict=True)]
    responses = scorer.execute([forward(tensors, contract.SCORER.inputs) for tensors in joined])
    for response, row in zip(responses, rows, strict=True):
        response.tensors |= {spec.name: row[spec.name] for spec in (contract.SCORED_LABELS, contract.NUM_INPUT_TOKENS)}
    return list(responses)


def test_ragged_requests_are_one_batch_and_each_gets_its_own_answer(parts: Any) -> None:
    made = parts()
    one = Request(strings(contract.TEXT_INPUT, ["hello"]))
    two = Request(strings(contract.TEXT_INPUT, ["a"], ["abc"]), strings(contract.LABELS, ["x", "yz"], ["x", "yz"]))
    first, second = run_all(made, one, two)
    assert made[3].batches == [[5 + 2 + 3, 1 + 1 + 2, 3 + 1 + 2]], "one call, all rows, none padded"
    assert first.tensors["label"].tolist() == [[b"yes"]]
    assert first.tensors["scored_labels"].tolist() == [[b"no", b"yes"]]
    assert second.tensors["scored_labels"].tolist() == [[b"x", b"yz"]] * 2
    assert second.tensors["num_input_tokens"].tolist() == [[1], [3]]
    for response in (first, second):
        np.testing.assert_allclose(response.tensors["probabilities"].sum(axis=1), 1, atol=1e-6)
        assert not response.tensors["is_calibrated"].any()
        for spec in contract.SCORE.outputs:
            assert response.tensors[spec.name].dtype == NUMPY_DTYPES[spec.dtype]


def test_a_calibration_is_used_for_its_own_labels_in_their_order_alone(parts: Any, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    fitted = ProbabilityCalibration(LABELS, 1.0, (100.0, 0.0), "bias", "mean", {})
    (tmp_path / "1" / "calibration.json").write_text(fitted.to_json())
    made = parts()
    own, other = run_all(
        made,
        Request(strings(contract.TEXT_INPUT, ["hello"])),
        Request(strings(contract.TEXT_INPUT, ["hello"]), strings(contract.LABELS, ["yes", "no"])),
    )
    assert (own.tensors["label"].tolist(), own.tensors["is_calibrated"].tolist()) == ([[b"no"]], [[True]])
    assert (other.tensors["label"].tolist(), other.tensors["is_calibrated"].tolist()) == ([[b"yes"]], [[False]])
    np.testing.assert_allclose(own.tensors["log_probs"], other.tensors["log_probs"][:, ::-1])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((), "give either text_input or messages"),
        ((strings(contract.TEXT_INPUT, [""]),), "text_input is empty"),
        ((strings(contract.TEXT_INPUT, ["a", "b"]),), r"text_input has shape [1, 2], must be [texts, 1]"),
        ((strings(contract.TEXT_INPUT, ["a"]), strings(contract.LABELS, ["a"])), "labels holds 1 label"),
        ((strings(contract.TEXT_INPUT, ["a"]), strings(contract.LABELS, ["a", "a"])), "is a duplicate"),
        ((strings(contract.MESSAGES, ["[]"]),), "messages is empty"),
        ((strings(contract.TEXT_INPUT, ["a" * 70]),), "the prompt has 70 tokens"),
    ],
)
def test_a_request_at_fault_gets_its_own_error(parts: Any, tensors: tuple[Tensor, ...], message: str) -> None:
    bad, good = parts()[0].execute([Request(*tensors), Request(strings(contract.TEXT_INPUT, ["ok"]))])
    assert bad.error is not None and message in bad.error.message_
    assert (good.error is None and good.tensors["num_input_tokens"].tolist() == [[2 + 1]]) or good.error is None


def test_a_plans_tokenizer_says_how_much_fits_into_one_request(parts: Any) -> None:
    tokenizer = parts(max_request_tokens=20)[0]
    texts = [["abcdef"], ["abc"]]
    (response,) = tokenizer.execute([Request(strings(contract.TEXT_INPUT, *texts))])
    assert "2 texts of up to 11 tokens in one request, together at most 20" in response.error.message_
    (response,) = tokenizer.execute([Request(strings(contract.TEXT_INPUT, ["abcdefghijklmnopq"]))])
    assert response.error is None, "one text may be as long as the model's limit"


def test_the_tokenizer_tells_its_build(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manifest, "load", lambda path: SimpleNamespace(identity=f"of {path.parent.name}/{path.name}"))
    tokenizer, *_ = parts()
    asked = Request(strings(contract.TEXT_INPUT, ["x"]), describe_build="1")
    (answer,) = tokenizer.execute([asked])
    assert answer.error is None and answer.tensors["scored_labels"].tolist() == [["of m-engine/1"]]


def test_the_engine_refuses_rows_that_would_fail_the_batch_and_scores_the_others(parts: Any) -> None:
    tokenizer, engine, _, runner = parts()
    good, bad = (
        response.tensors
        for response in tokenizer.execute([Request(strings(contract.TEXT_INPUT, [t])) for t in ("good", "bad")])
    )
    bad["target_ids"] = np.full_like(bad["target_ids"], 320)
    answers = engine.execute([forward(tensors, contract.SCORE_ENGINE.inputs) for tensors in (bad, good)])
    assert "target_ids has values from 320 to 320, must be 0 to 319" in answers[0].error.message_
    assert answers[1].error is None and answers[1].tensors["hidden_state"].shape == (1, 3)
    assert len(runner.batches) == 1 and len(runner.batches[0]) == 1
    (response,) = engine.execute([Request()])
    assert response.error.message_ == "input_ids is missing"
    assert len(runner.batches) == 1, "nothing was left to score"


def test_log_probabilities_that_nobody_asks_for_are_not_computed(parts: Any) -> None:
    tokenizer, engine, _, _ = parts()
    rows = [own.tensors for own in tokenizer.execute([Request(strings(contract.TEXT_INPUT, [t])) for t in ("a", "b")])]
    requests = [forward(row, contract.SCORE_ENGINE.inputs) for row in rows]
    requests[0].outputs = ["hidden_state"]
    for answer in engine.execute(requests):
        assert set(answer.tensors) == {"token_log_probs", "hidden_state"}, "the other asks for them"
    requests[1].outputs = ["hidden_state"]
    for answer in engine.execute(requests):
        assert set(answer.tensors) == {"hidden_state"}
