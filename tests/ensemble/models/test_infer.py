"""NAME-infer: the ensemble's responses to a request become one response."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.ensemble.models.test_adapters import Response, Tensor, TritonError, wait_until

Outputs = dict[str, Any]
UNAVAILABLE = TritonError.UNAVAILABLE
TEXT = Tensor("text_input", np.array([[b"x"]], np.object_))


def outputs(index: int, text: bytes, log_probs: list[float]) -> Outputs:
    return {
        "text_output": np.array([text], np.object_),
        "batch_index": np.array([[index]], np.int32),
        "output_log_probs": np.array([[log_probs]], np.float32),
        "top_log_probs": np.array([[b"[]"] * len(log_probs)], np.object_),
    }


class Answer(Response):
    def has_error(self) -> bool:
        return self.error is not None

    def output_tensors(self) -> list[Tensor]:
        return [Tensor(name, values) for name, values in self.tensors.items()]


class Request:
    """Of a client that reads one response."""

    def __init__(self, *tensors: Tensor, request_id: str = "", **parameters: Any) -> None:
        self._tensors, self._id, self._parameters = tensors or (TEXT,), request_id, parameters
        self.sent: list[Response] = []
        self.has_gone = False

    def inputs(self) -> list[Tensor]:
        return list(self._tensors)

    def request_id(self) -> str:
        return self._id

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def is_cancelled(self) -> bool:
        return self.has_gone

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: Response, flags: int) -> None:
        assert flags == 1 and not self.sent
        self.sent.append(response)


class Calls:
    """Stands where pb_utils.InferenceRequest does: keeps the calls, and answers them."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.answers: list[Answer] = []
        self.may_end = threading.Event()
        self.may_end.set()

    def __call__(self, **call: Any) -> Calls:
        self.made.append(call)
        return self

    def exec(self, *, decoupled: bool) -> Iterator[Answer]:
        assert decoupled
        if self.made[-1]["model_name"] == "m-engine":
            self.may_end.set()
        self.may_end.wait(20)
        yield from self.answers
        yield Answer([])  # the last response may be empty


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    fake: Any = ModuleType("triton_python_backend_utils")
    fake.Tensor, fake.TritonError, fake.InferenceResponse = Tensor, TritonError, Response
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL, fake.InferenceRequest = 1, Calls()
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return fake.InferenceRequest  # type: ignore[no-any-return]


@pytest.fixture
def model(calls: Calls) -> Iterator[Any]:
    name = "deepseek_triton.ensemble.models.infer"
    sys.modules.pop(name, None)
    infer = importlib.import_module(name)
    infer_model = infer.TritonPythonModel()
    infer_model.initialize({"model_name": "m-infer", "model_version": "1"})
    yield infer_model
    infer_model.finalize()
    sys.modules.pop(name)


def ask(model: Any, request: Request) -> Response:
    model.execute([request])
    wait_until(lambda: request.sent)
    return request.sent[0]


def test_the_prompts_answers_come_in_order_and_shorter_rows_are_filled_up(model: Any, calls: Calls) -> None:
    later, earlier = outputs(1, b"b", [-1.0, -2.0]), outputs(0, b"a", [-3.0])
    calls.answers = [Answer([Tensor(name, values) for name, values in each.items()]) for each in (later, earlier)]
    stream = Tensor("stream", np.array([[True], [True]]))
    text = Tensor("text_input", np.array([[b"x"], [b"y"]], np.object_))
    found = ask(model, Request(text, stream, request_id="7")).tensors
    assert found["text_output"].tolist() == [b"a", b"b"] and found["batch_index"].tolist() == [[0], [1]]
    assert found["output_log_probs"].tolist() == [[[-3.0, 0.0]], [[-1.0, -2.0]]]
    assert found["top_log_probs"].tolist() == [[b"[]", b""], [b"[]", b"[]"]]
    (call,) = calls.made
    assert (call["model_name"], call["request_id"], call["inputs"]) == ("m", "7", [text])


class Failure(Answer):
    """An error as Triton hands it to the caller: the text alone."""

    def __init__(self, text: str) -> None:
        self.text = text

    def has_error(self) -> bool:
        return True

    def error(self) -> Any:  # type: ignore[override]
        return self

    def message(self) -> str:
        return self.text


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        ("in ensemble 'm', [invalid] max_tokens is 0", "max_tokens is 0", TritonError.INVALID_ARG),
        ("in ensemble 'm', [unavailable] queue is full; retry later", "queue is full; retry later", UNAVAILABLE),
        ("[internal] the engine failed: [invalid] x", "the engine failed: [invalid] x", TritonError.INTERNAL),
        ("in ensemble 'm', Exceeds maximum queue size", "in ensemble 'm', Exceeds maximum queue size", UNAVAILABLE),
        ("Stub process is not healthy", "Stub process is not healthy", TritonError.INTERNAL),
    ],
)
def test_an_error_of_the_ensemble_is_the_answer_and_keeps_its_kind(
    model: Any, calls: Calls, text: str, message: str, code: int
) -> None:
    calls.answers = [Failure(text)]
    error = ask(model, Request()).error
    assert error is not None and (error.message_, error.code_) == (message, code)
    assert calls.made[0]["parameters"]["error_kind_in_text"] is True


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(temprature="1"), "unknown field 'temprature'; did you mean temperature?"),
        (Request(temperature="1"), "temperature is a parameter of the request, must be an input"),
        (Request(Tensor("seed", np.array([[1]], np.uint64))), "give either text_input or messages"),
    ],
)
def test_what_the_ensemble_would_refuse_or_never_see_is_refused_at_once(
    model: Any, calls: Calls, request_: Request, message: str
) -> None:
    error = ask(model, request_).error
    assert error is not None and (error.message_, error.code_) == (message, TritonError.INVALID_ARG)
    assert calls.made == []


def test_too_many_requests_are_refused_and_nothing_is_asked_for_one_whose_client_has_gone(
    model: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer = sys.modules[type(model).__module__]
    monkeypatch.setattr(infer, "MAX_CALLS", 0)
    monkeypatch.setattr(infer, "MAX_WAITING", 1)
    calls.may_end.clear()
    first = Request()
    model.execute([first])
    error = ask(model, Request()).error
    assert error is not None and error.code_ == UNAVAILABLE and error.message_.endswith("; retry later")
    calls.may_end.set()
    wait_until(lambda: first.sent)
    calls.made.clear()
    gone = infer.InferCall(Request(), "1", "key")  # the poller has closed it while it waited
    model._answer(gone, gone.request)
    assert gone.request.sent[0].error is not None and calls.made == []


def test_a_call_that_can_t_be_made_is_answered(model: Any, calls: Calls) -> None:
    calls.answers = [Answer([Tensor("text_output", np.array([b"a"], np.object_))])] * 2  # without batch_index
    error = ask(model, Request()).error
    assert error is not None and "the request can't be answered" in error.message_


def test_the_request_of_a_client_that_has_gone_is_stopped(model: Any, calls: Calls) -> None:
    calls.may_end.clear()
    request = Request(request_id="9")
    model.execute([request])
    wait_until(lambda: calls.made)
    request.has_gone = True
    wait_until(lambda: request.sent)
    assert [(call["model_name"], call["request_id"]) for call in calls.made] == [("m", "9"), ("m-engine", "9")]
    asked, stopped = (call["parameters"]["stop_key"] for call in calls.made)
    assert asked == stopped != ""


def test_two_requests_with_the_same_id_have_keys_of_their_own_unless_the_client_gives_one(
    model: Any, calls: Calls
) -> None:
    for parameters in ({}, {}, {"stop_key": "secret"}):
        ask(model, Request(request_id="1", **parameters))
    keys = [call["parameters"]["stop_key"] for call in calls.made]
    assert len(set(keys)) == 3 and keys[2] == "secret"


class SlowlyAsked(Request):
    """Triton takes its time to say whether the client has gone."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.may_answer = threading.Event(), threading.Event()
        self.was_sent_when_asked = False

    def is_cancelled(self) -> bool:
        self.was_sent_when_asked = bool(self.sent)
        self.is_asked.set()
        self.may_answer.wait(20)
        self.was_sent_when_asked |= bool(self.sent)
        return False


def test_triton_is_never_asked_about_a_request_that_it_has_freed(model: Any, calls: Calls) -> None:
    """The last response frees it; a question on the way then ends tritonserver with a segmentation fault."""
    calls.may_end.clear()
    request = SlowlyAsked()
    model.execute([request])
    assert request.is_asked.wait(20)
    calls.may_end.set()
    time.sleep(0.3)  # in which the answer is made
    assert not request.sent
    request.may_answer.set()
    wait_until(lambda: request.sent)
    request.is_asked.clear()
    assert not request.is_asked.wait(0.5) and not request.was_sent_when_asked
