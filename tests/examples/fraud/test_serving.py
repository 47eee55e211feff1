"""The whole application on a real tritonserver, with a tiny random language model."""

from __future__ import annotations

import gc
import importlib
import json
import sys
import urllib.request
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deepseek_triton.clients.errors import RequestRejected
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.clients.score import ScoreRequest, Tensor
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.examples.fraud.data.payments import LabelledPayment, make_payments
from deepseek_triton.examples.fraud.model import LABELS, FraudModel
from deepseek_triton.examples.fraud.serving.contracts import DRIFT, EXPLANATION, FIELDS, NAME, judges, pipeline
from deepseek_triton.examples.fraud.serving.repository import TEXT_MODEL, build_text_model, write_fraud_models
from deepseek_triton.examples.fraud.training import TREES, features_of, hidden_states, train
from tests.support.checkpoints import make_tokenizer, write_tiny
from tests.support.fakes import FakeMetricFamilies, FakeMetricFamily
from tests.support.waiting import until

HIDDEN = 8


def test_the_judges_take_nothing_of_each_other_so_that_triton_runs_them_at_the_same_time() -> None:
    steps = {step.model_suffix: step for step in pipeline(HIDDEN).steps}
    made = {name: set(steps[name].output_map.values()) for name in judges(HIDDEN)}
    for name in judges(HIDDEN):
        assert not set(steps[name].input_map.values()) & set().union(*made.values())


def test_the_drift_model_lets_go_of_its_metrics_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the end of the backend's process finds of Triton's metrics ends it with a segmentation fault."""
    name = "deepseek_triton.examples.fraud.serving.drift"
    made = weakref.WeakSet[object]()

    class Families(FakeMetricFamilies):
        def __call__(self, *options: str) -> FakeMetricFamily:
            made.add(family := super().__call__(*options))
            return family

    fake = SimpleNamespace(MetricFamily=Families())
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)  # and out of them again, with the fake in it
    reference = SimpleNamespace(names=("amount", "hour"))
    monkeypatch.setattr(module, "load_model", lambda args: SimpleNamespace(reference=reference))
    monkeypatch.setattr(module, "DriftWindow", lambda reference: None)
    model = module.TritonPythonModel()
    model.initialize({})
    assert len(made) == 2
    model.finalize()
    gc.collect()
    assert len(made) == 0


@dataclass(frozen=True)
class Served:
    server: TritonServer
    client: GrpcClient
    model: FraudModel
    payments: list[LabelledPayment]
    hidden: Any


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("fraud")
    checkpoint = make_tokenizer(
        write_tiny(directory / "tiny", vocab_size=320, eos_token_id=319, max_position_embeddings=512)
    )
    repository = directory / "models"
    build_text_model(checkpoint, repository, "fp32")
    payments = make_payments(200, 1)
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    with TritonServer(repository, **ports) as server, GrpcClient(server.grpc_url, TEXT_MODEL) as client:  # type: ignore[arg-type]
        hidden = hidden_states(client, [payment.record.text() for payment in payments])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TREES, "n_estimators", 10)
        model = train(payments, hidden)
    write_fraud_models(repository, model)
    with TritonServer(repository, **ports) as server, GrpcClient(server.grpc_url, NAME) as client:  # type: ignore[arg-type]
        yield Served(server, client, model, payments, hidden)


@pytest.mark.server
@pytest.mark.slow
def test_decisions_explanations_and_drift(served: Served) -> None:
    asked = served.payments[:40]
    expected = served.model.probabilities(served.model.inputs(features_of(asked), served.hidden[:40]))
    texts = [payment.record.to_json() for payment in asked]
    with ThreadPoolExecutor(8) as pool:  # requests that share batches
        scores = list(pool.map(lambda text: served.client.score(ScoreRequest(text))[0], texts))
    found = np.array([[score.probabilities[label] for label in LABELS] for score in scores])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    is_fraud = [score.label == LABELS[1] for score in scores]
    assert is_fraud == [bool(each >= served.model.threshold) for each in found[:, 1]]

    several = ScoreRequest(tuple(texts[:5])).to_tensors()
    outputs = served.client.infer(NAME, several, (EXPLANATION, DRIFT, contract.PROBABILITIES))
    probabilities = np.array(outputs["probabilities"].values).reshape(-1, 2)[:, 1]
    for (text,), probability in zip(outputs["explanation"].rows(), probabilities, strict=True):
        told = json.loads(text)
        assert told["probability"] == pytest.approx(probability, abs=1e-5)
        assert told["base"] + sum(told["contributions"].values()) == pytest.approx(told["log_odds"], abs=1e-6)


@pytest.mark.server
@pytest.mark.slow
def test_a_record_as_tensors_is_decided_as_its_json(served: Served) -> None:
    record = served.payments[0].record
    tensors = {spec: Tensor((1, 1), [getattr(record, spec.name)]) for spec in FIELDS}
    outputs = served.client.infer(NAME, tensors, (contract.PROBABILITIES,))
    (score,) = served.client.score(ScoreRequest(record.to_json()))
    assert outputs["probabilities"].values[1] == pytest.approx(score.probabilities[LABELS[1]], abs=1e-4)


@pytest.mark.server
@pytest.mark.slow
def test_an_invalid_record_fails_alone(served: Served) -> None:
    good, bad = served.payments[0].record.to_json(), '{"amount": 1}'
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(served.client.score, ScoreRequest(bad if i % 4 == 0 else good)) for i in range(16)]
    for i, future in enumerate(futures):
        if i % 4:
            assert len(future.result()) == 1
        else:
            with pytest.raises(RequestRejected, match="usual_amount is missing"):
                future.result()
    with pytest.raises(RequestRejected, match="is missing: give text_input, JSON, or every field"):
        served.client.infer(NAME, {FIELDS[0]: Tensor((1, 1), [1.0])}, (contract.PROBABILITIES,))


@pytest.mark.server
@pytest.mark.slow
def test_drift_is_on_metrics(served: Served) -> None:
    moved = [replace(payment.record, hour=2, is_new_device=True) for payment in make_payments(60, 2)]
    for record in moved:
        served.client.score(ScoreRequest(record.to_json()))
    lines: list[str] = []

    def num_records() -> float:
        """Of the window, as last published."""
        with urllib.request.urlopen(served.server.metrics_url, timeout=30) as response:
            lines[:] = response.read().decode().splitlines()
        counts = [line for line in lines if line.startswith("deepseek_drift_window_records{")]
        return sum(float(line.split()[-1]) for line in counts)

    before = num_records()  # it may have been published while some of the records came

    def is_published() -> bool:
        """A request publishes what came before it, once a second."""
        served.client.score(ScoreRequest(moved[0].to_json()))
        return num_records() != before

    until(is_published)
    psi = {line.split('input="')[1].split('"')[0]: float(line.split()[-1]) for line in lines
           if line.startswith("deepseek_drift_psi{")}  # fmt: skip
    assert set(psi) == set(served.model.reference.names)
    assert psi["night"] > 0.25 and psi["new device"] > 0.1
    assert num_records() > 60
