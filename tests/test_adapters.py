from __future__ import annotations

import importlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ensemble import contract
from ensemble.acknowledge import AcknowledgementReceiver, AcknowledgementSender, pipe_path
from ensemble.contract import TensorSpec
from ensemble.models.tensors import NUMPY_DTYPES
from ensemble.settings import EngineSettings
from tests.checkpoints import make_tokenizer
from tests.fakes import FakeRunner, expected_tokens

FINAL = 1


class Tensor:
    """As Triton's own, it is strict about what it takes."""

    def __init__(self, name: str, values: NDArray[Any]) -> None:
        assert isinstance(name, str) and isinstance(values, np.ndarray)
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._values


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG = range(4)

    def __init__(self, message: str, code: int = UNKNOWN) -> None:
        assert "\n" not in message
        self.message_, self.code_ = message, code


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self.error = error


class ResponseSender:
    """Keeps what was sent; sending after the final response is an error, as in Triton."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.is_final = False
        self.has_gone = False
        self.num_polls = 0

    def send(self, response: Response, flags: int = 0) -> None:
        assert not self.is_final, "sent after the final response"
        self.responses.append(response)
        self.is_final = bool(flags & FINAL)

    def is_cancelled(self) -> bool:
        self.num_polls += 1
        return self.has_gone


class Request:
    def __init__(self, *tensors: Tensor, request_id: str = "") -> None:
        self._tensors, self._id = tensors, request_id
        self.sender = ResponseSender()

    def inputs(self) -> list[Tensor]:
        return list(self._tensors)

    def request_id(self) -> str:
        return self._id

    def get_response_sender(self) -> ResponseSender:
        return self.sender


def tensor(spec: TensorSpec, *values: Any) -> Tensor:
    return Tensor(spec.name, np.array(values, NUMPY_DTYPES[spec.dtype]).reshape(1, -1))


def request(values: dict[TensorSpec, Any], request_id: str = "") -> Request:
    return Request(
        *(tensor(spec, *(value if isinstance(value, list) else [value])) for spec, value in values.items()),
        request_id=request_id,
    )


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports an adapter beside a fake of what Triton gives it."""
    fake: Any = ModuleType("triton_python_backend_utils")
    fake.Tensor, fake.TritonError, fake.InferenceResponse = Tensor, TritonError, Response
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    imported: list[str] = []

    def load(name: str) -> ModuleType:
        imported.append(f"ensemble.models.{name}")
        return importlib.import_module(imported[-1])

    yield load
    for name in imported:
        sys.modules.pop(name, None)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's directory whose version 3 holds a tokenizer; the pipes are in the same temporary directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_tokenizer(tmp_path / "model" / "3")
    return tmp_path / "model"


def arguments(directory: Path, name: str, **config: Any) -> dict[str, str]:
    return {
        "model_repository": str(directory),
        "model_version": "3",
        "model_name": name,
        "model_config": json.dumps(config),
    }


def check_outputs(response: Response, outputs: tuple[TensorSpec, ...]) -> None:
    assert response.error is None
    assert set(response.tensors) == {spec.name for spec in outputs}
    for spec in outputs:
        array = response.tensors[spec.name]
        assert array.dtype == NUMPY_DTYPES[spec.dtype] and array.ndim == 2 and len(array) == 1
        assert spec.dims == (-1,) or array.shape == (1, 1)


# The tokenizer


@pytest.fixture
def tokenizer(adapter: Callable[[str], ModuleType], directory: Path) -> Any:
    model = adapter("tokenizer").TritonPythonModel()
    model.initialize(arguments(directory, "m-tokenizer"))
    return model


def test_tokenizer_encodes_text_and_messages(tokenizer: Any) -> None:
    messages = json.dumps([{"role": "user", "content": "hi"}]).encode()
    requests = [request({contract.TEXT_INPUT: b"ab"}), request({contract.MESSAGES: messages})]
    text, chat = tokenizer.execute(requests)
    for response in (text, chat):
        check_outputs(response, contract.TOKENIZER.outputs)
        assert response.tensors["acknowledge"].all()
    assert text.tensors["input_ids"].shape == (1, 2)
    assert chat.tensors["input_ids"].shape == (1, len("user: hi\n"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either text_input or messages"),
        ({contract.TEXT_INPUT: b"a", contract.MESSAGES: b"[]"}, "give either text_input or messages"),
        ({contract.TEXT_INPUT: b""}, "text_input is empty"),
        ({contract.TEXT_INPUT: b"\xff\xfe"}, "text_input is not UTF-8 (byte 0)"),
        ({contract.TEXT_INPUT: [b"a", b"b"]}, "text_input holds 2 values, must hold one"),
        ({contract.TEXT_INPUT: []}, "text_input holds 0 values, must hold one"),
        ({contract.MESSAGES: b"{"}, "messages is not JSON"),
        ({contract.MESSAGES: b"[]"}, "messages is empty"),
        ({contract.MESSAGES: b'[{"role": "user"}]'}, "messages[0].content is missing"),
    ],
)
def test_tokenizer_answers_a_bad_request_and_the_others_beside_it(
    tokenizer: Any, values: dict[TensorSpec, Any], message: str
) -> None:
    good = request({contract.TEXT_INPUT: b"good"})
    before, bad, after = tokenizer.execute([good, request(values), good])
    assert message in bad.error.message_ and bad.error.code_ == TritonError.INVALID_ARG
    for response in (before, after):
        check_outputs(response, contract.TOKENIZER.outputs)
        assert response.tensors["input_ids"].shape == (1, 4)


def test_tokenizer_without_its_files_says_which(adapter: Callable[[str], ModuleType], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        adapter("tokenizer").TritonPythonModel().initialize(arguments(tmp_path, "m-tokenizer"))


# The detokenizer


@pytest.fixture
def detokenizer(adapter: Callable[[str], ModuleType], directory: Path) -> Iterator[Any]:
    model = adapter("detokenizer").TritonPythonModel()
    model.initialize(arguments(directory, "m-detokenizer"))
    yield model
    model.finalize()


def ids_of(directory: Path, text: str) -> list[int]:
    from ensemble.text import Tokenizer

    ids: list[int] = Tokenizer.from_directory(directory / "3").encode(text).tolist()
    return ids


def generated(ids: list[int], sequence: int = 1, reason: str = "") -> Request:
    return request(
        {
            contract.OUTPUT_IDS: ids,
            contract.SEQUENCE_ID: sequence,
            contract.FINISH_REASON: reason.encode(),
            contract.NUM_INPUT_TOKENS: 5,
            contract.NUM_OUTPUT_TOKENS: 7,
        }
    )


def texts(model: Any, *requests: Request) -> list[str]:
    responses = model.execute(list(requests))
    for response in responses:
        check_outputs(response, contract.DETOKENIZER.outputs)
    return [response.tensors["text_output"][0, 0].decode() for response in responses]


def test_detokenizer_passes_progress_on(detokenizer: Any, directory: Path) -> None:
    (response,) = detokenizer.execute([generated(ids_of(directory, "end"), reason="length")])
    check_outputs(response, contract.DETOKENIZER.outputs)
    assert {name: array[0, 0] for name, array in response.tensors.items()} == {
        "text_output": b"end", "finish_reason": b"length", "num_input_tokens": 5, "num_output_tokens": 7,
    }  # fmt: skip


def test_detokenizer_keeps_each_stream_s_half_characters_apart(detokenizer: Any, directory: Path) -> None:
    first, second = ids_of(directory, "é"), ids_of(directory, "北")
    assert (len(first), len(second)) == (2, 3)
    assert texts(detokenizer, generated(first[:1], 1), generated(second[:1], 2)) == ["", ""]
    assert texts(detokenizer, generated(second[1:2], 2), generated(first[1:], 1)) == ["", "é"]
    assert texts(detokenizer, generated(second[2:], 2, "stop"), generated([], 1, "stop")) == ["北", ""]


def test_detokenizer_takes_several_responses_of_one_stream_in_one_batch(detokenizer: Any, directory: Path) -> None:
    ids = ids_of(directory, "日本")
    pieces = [generated([token], 1, "stop" if i == len(ids) - 1 else "") for i, token in enumerate(ids)]
    assert texts(detokenizer, *pieces) == ["", "", "日", "", "", "本"]


def test_detokenizer_forgets_a_stream_that_ended(detokenizer: Any, directory: Path) -> None:
    half = ids_of(directory, "é")[:1]
    texts(detokenizer, generated(half, 1))
    assert texts(detokenizer, generated([], 1, "cancelled")) == ["\ufffd"]
    assert not detokenizer._streams
    assert texts(detokenizer, generated(ids_of(directory, "a"), 1)) == ["a"]


def test_detokenizer_s_memory_of_streams_that_never_end_is_bounded(
    adapter: Callable[[str], ModuleType], detokenizer: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter("detokenizer"), "MAX_STREAMS", 3)
    head, tail = ids_of(directory, "é")
    for sequence in range(3):
        texts(detokenizer, generated([head], sequence))
    texts(detokenizer, generated([], 0))  # 0 was used last, 1 is the oldest now
    texts(detokenizer, generated([head], 3))
    assert list(detokenizer._streams) == [2, 0, 3]
    assert texts(detokenizer, generated([tail], 0)) == ["é"]


def test_detokenizer_acknowledges_each_response(detokenizer: Any, directory: Path) -> None:
    texts(detokenizer, generated([5], 9))  # no engine listens: that is no error
    receiver = AcknowledgementReceiver(pipe_path("m", "3"))
    texts(detokenizer, generated([5], 9), generated([5], 2**63), generated([], 9, "stop"))
    assert receiver.drain() == [9, 2**63, 9]
    receiver.close()


# The engine


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(num_slots=2, max_seq_len=64)


@pytest.fixture
def engine(
    adapter: Callable[[str], ModuleType], directory: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    module = adapter("engine")
    loaded: list[tuple[Path, EngineSettings]] = []

    def load_runner(path: Path, settings: EngineSettings) -> tuple[Any, FakeRunner]:
        loaded.append((path, settings))
        return SimpleNamespace(end_ids=(0,)), runner

    monkeypatch.setattr(module, "load_runner", load_runner)
    model = module.TritonPythonModel()
    parameters = {"num_slots": {"string_value": "2"}, "prefill_chunk": {"string_value": "4"}}
    model.initialize(arguments(directory, "m-engine", parameters=parameters))
    assert loaded == [(directory / "3", EngineSettings(num_slots=2, prefill_chunk=4))]
    yield model
    if not runner.is_closed:
        model.finalize()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def answers(sender: ResponseSender) -> list[int]:
    wait_until(lambda: sender.is_final)
    for response in sender.responses:
        check_outputs(response, contract.ENGINE.outputs)
    return [token for response in sender.responses for token in response.tensors["output_ids"][0].tolist()]


PROMPT = [5, 6, 7]


def test_engine_answers_in_one_response_or_as_a_stream(engine: Any) -> None:
    whole = request({contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: 6})
    stream = request({contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: 6, contract.STREAM: True})
    assert engine.execute([whole, stream]) is None
    assert answers(whole.sender) == answers(stream.sender) == expected_tokens(PROMPT, 6)
    assert len(whole.sender.responses) == 1 and len(stream.sender.responses) > 1
    for sender in (whole.sender, stream.sender):
        reasons = [response.tensors["finish_reason"][0, 0] for response in sender.responses]
        assert reasons == [b""] * (len(reasons) - 1) + [b"length"]
        last = sender.responses[-1].tensors
        assert (last["num_input_tokens"][0, 0], last["num_output_tokens"][0, 0]) == (3, 6)
    ids = [sender.responses[0].tensors["sequence_id"][0, 0] for sender in (whole.sender, stream.sender)]
    assert ids[1] == ids[0] + 1 and {r.tensors["sequence_id"][0, 0] for r in stream.sender.responses} == {ids[1]}


def test_engine_hands_the_sampling_parameters_on(engine: Any) -> None:
    def tokens(seed: int) -> list[int]:
        sampled = request(
            {
                contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: 20, contract.TEMPERATURE: 5.0,
                contract.TOP_K: 50, contract.TOP_P: 0.9, contract.SEED: seed,
            }
        )  # fmt: skip
        engine.execute([sampled])
        return answers(sampled.sender)

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(1) != expected_tokens(PROMPT, 20)
    assert max(tokens(1)) < 50, "of FakeRunner's equal logits the lower ids come first"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "input_ids is missing"),
        ({contract.INPUT_IDS: []}, "the prompt is empty"),
        ({contract.INPUT_IDS: [1] * 64}, "the prompt has 64 tokens, the context holds 64; shorten the prompt"),
        ({contract.INPUT_IDS: [1, 100]}, "input_ids must lie in 0 … 99, got 100"),
        ({contract.INPUT_IDS: [-1]}, "input_ids must lie in 0 … 99, got -1"),
        ({contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: 0}, "max_tokens is 0"),
        ({contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: -1}, "max_tokens is -1"),
        ({contract.INPUT_IDS: PROMPT, contract.TEMPERATURE: -1.0}, "temperature is -1.0"),
        ({contract.INPUT_IDS: PROMPT, contract.TEMPERATURE: np.nan}, "temperature is nan"),
        ({contract.INPUT_IDS: PROMPT, contract.TOP_P: np.nan}, "top_p is nan"),
        ({contract.INPUT_IDS: PROMPT, contract.TOP_P: 0.0}, "top_p is 0.0"),
        ({contract.INPUT_IDS: PROMPT, contract.TOP_K: -2}, "top_k is -2"),
        ({contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: [1, 2]}, "max_tokens holds 2 values, must hold one"),
        ({contract.STOP: True}, "stop needs the id of the request to stop"),
        ({contract.STOP: [True, True]}, "stop holds 2 values"),
    ],
)
def test_engine_answers_a_bad_request_and_the_others_beside_it(
    engine: Any, values: dict[TensorSpec, Any], message: str
) -> None:
    bad, good = request(values), request({contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: 4})
    engine.execute([bad, good])
    assert bad.sender.is_final and len(bad.sender.responses) == 1
    error = bad.sender.responses[0].error
    assert error is not None and message in error.message_ and error.code_ == TritonError.INVALID_ARG
    assert answers(good.sender) == expected_tokens(PROMPT, 4)


def test_engine_failures_of_the_runner_end_one_request(engine: Any, runner: FakeRunner) -> None:
    runner.fail_next = RuntimeError("out of luck")
    failed = request({contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: 4})
    engine.execute([failed])
    wait_until(lambda: failed.sender.is_final)
    error = failed.sender.responses[-1].error
    assert error is not None and "prefill failed: out of luck" in error.message_
    assert error.code_ == TritonError.INTERNAL
    later = request({contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: 4})
    engine.execute([later])
    assert answers(later.sender) == expected_tokens(PROMPT, 4)


class Gate(FakeRunner):
    """Decodes while `is_open`: a sequence stays as long as the test needs it."""

    is_open = False

    def decode(self, ids: Any, positions: Any) -> Any:
        wait_until(lambda: self.is_open)
        return super().decode(ids, positions)


class TestWithAGate:
    @pytest.fixture
    def runner(self) -> FakeRunner:
        return Gate(num_slots=2, max_seq_len=64)

    def start(self, engine: Any, request_id: str = "", *, acknowledge: bool = False) -> Request:
        values = {contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: 50, contract.STREAM: True}
        started = request({**values, **({contract.ACKNOWLEDGE: True} if acknowledge else {})}, request_id)
        engine.execute([started])
        wait_until(lambda: started.sender.responses)
        return started

    def test_a_request_is_stopped_by_its_id(self, engine: Any, runner: Gate) -> None:
        one, other = self.start(engine, "one"), request({contract.INPUT_IDS: PROMPT, contract.MAX_TOKENS: 5})
        engine.execute([other])
        stop = request({contract.STOP: True}, "one")
        engine.execute([stop])
        runner.is_open = True
        assert answers(stop.sender) == []
        assert stop.sender.responses[0].tensors["finish_reason"][0, 0] == b"cancelled"
        tokens = answers(one.sender)
        assert tokens == expected_tokens(PROMPT, len(tokens)) and len(tokens) < 50
        assert one.sender.responses[-1].tensors["finish_reason"][0, 0] == b"cancelled"
        assert answers(other.sender) == expected_tokens(PROMPT, 5)

    def test_stopping_what_has_ended_is_answered_too(self, engine: Any, runner: Gate) -> None:
        stop = request({contract.STOP: True}, "nobody")
        engine.execute([stop])
        assert answers(stop.sender) == []

    def test_a_direct_client_that_has_gone_is_noticed_by_asking(self, engine: Any, runner: Gate) -> None:
        started = self.start(engine)
        started.sender.has_gone = True
        time.sleep(0.12)  # asked ten times a second at most
        runner.is_open = True
        tokens = answers(started.sender)
        assert len(tokens) < 50
        assert started.sender.responses[-1].tensors["finish_reason"][0, 0] == b"cancelled"
        assert started.sender.num_polls <= 3

    def test_through_an_ensemble_acknowledgements_are_awaited_and_nobody_is_asked(
        self, engine: Any, runner: Gate
    ) -> None:
        started = self.start(engine, acknowledge=True)
        sender = AcknowledgementSender(pipe_path("m", "3"))
        runner.is_open = True
        while not started.sender.is_final:
            wait_until(lambda: len(started.sender.responses) > 0)
            sender.send([int(started.sender.responses[-1].tensors["sequence_id"][0, 0])])
            time.sleep(0.001)
        sender.close()
        assert answers(started.sender) == expected_tokens(PROMPT, 50)
        assert started.sender.num_polls == 0

    def test_finalize_ends_what_runs_and_waits(self, engine: Any, runner: Gate) -> None:
        running, waiting = self.start(engine), request({contract.INPUT_IDS: PROMPT})
        engine.execute([waiting])
        pipe = pipe_path("m", "3")
        assert pipe.exists()
        # The step under way ends only after finalize has begun.
        timer = threading.Timer(0.1, lambda: setattr(runner, "is_open", True))
        timer.start()
        engine.finalize()
        timer.join()
        for sender in (running.sender, waiting.sender):
            assert sender.is_final
            error = sender.responses[-1].error
            assert error is not None and "shutting down" in error.message_
        assert runner.is_closed and not pipe.exists()


def test_sequence_ids_of_two_engines_differ(adapter: Callable[[str], ModuleType], engine: Any) -> None:
    first = next(engine._sequence_ids)
    assert 0 <= first < 2**63 and first % 2**32 == 0
