from __future__ import annotations

import gc
import importlib
import itertools
import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.guided.compiler import MAX_CONCURRENT
from deepseek_triton.ensemble.guided.grammar import GRAMMARS
from deepseek_triton.ensemble.models.tensors import NUMPY_DTYPES
from deepseek_triton.ensemble.processes.acknowledgements import (
    AcknowledgementReceiver,
    AcknowledgementSender,
    pipe_path,
)
from deepseek_triton.ensemble.processes.low_priority import LowPriorityPool
from deepseek_triton.ensemble.processes.seal import Seal, model_seal
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec
from deepseek_triton.ensemble.protocol.progress import Progress, PromptInfo, StreamHead, Update
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.checkpoints import make_tokenizer
from tests.support.fakes import FakeMetricFamilies, FakeRunner, expected_tokens, next_token

FINAL = 1
VOCAB_SIZE = 320  # make_tokenizer's


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
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE = range(5)

    def __init__(self, message: str, code: int = UNKNOWN) -> None:
        assert "\n" not in message
        self.message_, self.code_ = message, code


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self.error = error


class ResponseSender:
    """Stores what was sent. Nothing may follow the final response: sending raises in Triton, asking crashes it."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.is_final = False
        self.has_gone = False
        self.num_polls = 0

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert not self.is_final, "sent after the final response"
        assert response is not None or flags & FINAL, "sent nothing"
        if response is not None:
            self.responses.append(response)
        self.is_final = bool(flags & FINAL)

    def is_cancelled(self) -> bool:
        assert not self.is_final, "asked after the final response"
        self.num_polls += 1
        return self.has_gone


class Request:
    def __init__(self, *tensors: Tensor, request_id: str = "", **parameters: Any) -> None:
        self._tensors, self._id, self._parameters = tensors, request_id, parameters
        self.sender = ResponseSender()
        self.outputs: list[str] | None = None  # those that are asked for; None: all of the model's

    def requested_output_names(self) -> list[str]:
        everything = [spec.name for spec in (*contract.SCORE_ENGINE.outputs, *contract.SCORE.outputs)]
        return everything if self.outputs is None else self.outputs

    def inputs(self) -> list[Tensor]:
        return list(self._tensors)

    def request_id(self) -> str:
        return self._id

    def parameters(self) -> str:
        """JSON, or nothing where there are none, as Triton gives it."""
        return json.dumps(self._parameters) if self._parameters else ""

    def get_response_sender(self) -> ResponseSender:
        return self.sender


def tensor(spec: TensorSpec, *values: Any) -> Tensor:
    return Tensor(spec.name, np.array(values, NUMPY_DTYPES[spec.dtype]).reshape(1, -1))


def request(values: dict[TensorSpec, Any], request_id: str = "", **parameters: Any) -> Request:
    return Request(
        *(tensor(spec, *(value if isinstance(value, list) else [value])) for spec, value in values.items()),
        request_id=request_id,
        **parameters,
    )


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports an adapter beside a fake of what Triton gives it."""
    fake: Any = ModuleType("triton_python_backend_utils")
    fake.Tensor, fake.TritonError, fake.InferenceResponse = Tensor, TritonError, Response
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    fake.MetricFamily = FakeMetricFamilies()
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    imported: list[str] = []

    def load(name: str) -> ModuleType:
        imported.append(f"deepseek_triton.ensemble.models.{name}")
        return importlib.import_module(imported[-1])

    yield load
    for name in imported:
        sys.modules.pop(name, None)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's directory whose version 3 holds a tokenizer; the pipes are in the same temporary directory."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
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
        # NVIDIA's clients read text_output[0] and output_log_probs [prompt, beam, token].
        num_axes = {contract.TEXT_OUTPUT: 1, contract.OUTPUT_LOG_PROBS: 3}.get(spec, 2)
        assert array.dtype == NUMPY_DTYPES[spec.dtype] and array.ndim == num_axes and (num_axes == 1 or len(array) == 1)
        assert spec.dims == (-1,) or array.shape == (1, 1)


# The tokenizer


@pytest.fixture
def tokenizer(adapter: Callable[[str], ModuleType], directory: Path) -> Iterator[Any]:
    model = adapter("tokenizer").TritonPythonModel()
    model.initialize(arguments(directory, "m-tokenizer"))
    yield model
    model.finalize()


def encode(tokenizer: Any, requests: list[Request]) -> list[Response]:
    """The answer to each request; the same one may come twice."""
    senders = []
    for one in requests:
        sender = ResponseSender()
        senders.append(sender)
        one.sender = sender
        assert tokenizer.execute([one]) is None
    wait_until(lambda: all(sender.is_final for sender in senders))
    return [sender.responses[0] for sender in senders]


def error_of(response: Response) -> TritonError:
    assert response.error is not None
    return response.error


def info_of(response: Response) -> PromptInfo:
    ids, sealed = response.tensors["input_ids"], response.tensors["prompt_info"][0, 0]
    info = PromptInfo.from_json(model_seal("m", "3").open(sealed, ids.tobytes()))
    assert info.arrived_at is not None and 0 <= time.monotonic() - info.arrived_at < 60
    return replace(info, arrived_at=None)


def test_tokenizer_encodes_several_prompts_of_a_request(tokenizer: Any) -> None:
    texts = np.array([[b"ab"], [b"a"], [b"abc"]], np.object_)
    several, one = encode(tokenizer, [Request(Tensor("text_input", texts)), request({contract.TEXT_INPUT: b"abc"})])
    ids, infos = several.tensors["input_ids"], several.tensors["prompt_info"]
    assert infos.shape == (3, 1) and len(ids) == 3
    for row, sealed_info in zip(ids, infos, strict=True):  # each prompt's info is sealed with its own ids
        PromptInfo.from_json(model_seal("m", "3").open(sealed_info[0], row[row != -1].tobytes()))
    assert ids[2].tolist() == one.tensors["input_ids"][0].tolist()
    assert (ids[1] == -1).sum() > 0, "the shorter prompts are filled up"
    bad = np.array([[b"ab"], [b"\xff"]], np.object_)
    (refused,) = encode(tokenizer, [Request(Tensor("text_input", bad))])
    assert refused.error is not None and "text_input is not UTF-8" in refused.error.message_


def test_tokenizer_encodes_text_and_messages(tokenizer: Any) -> None:
    messages = json.dumps([{"role": "user", "content": "hi"}]).encode()
    requests = [request({contract.TEXT_INPUT: b"ab"}), request({contract.MESSAGES: messages})]
    text, chat = encode(tokenizer, requests)
    for response in (text, chat):
        check_outputs(response, contract.TOKENIZER.outputs)
    assert info_of(text) == PromptInfo(is_reasoning_open=False, separates_reasoning=False)
    assert info_of(chat) == PromptInfo()
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
        ({contract.TEXT_INPUT: b"a", contract.ENABLE_THINKING: True}, "enable_thinking is for messages"),
    ],
)
def test_tokenizer_answers_a_bad_request_and_the_others_beside_it(
    tokenizer: Any, values: dict[TensorSpec, Any], message: str
) -> None:
    good = request({contract.TEXT_INPUT: b"good"})
    before, bad, after = encode(tokenizer, [good, request(values), good])
    assert message in error_of(bad).message_ and error_of(bad).code_ == TritonError.INVALID_ARG
    for response in (before, after):
        check_outputs(response, contract.TOKENIZER.outputs)
        assert response.tensors["input_ids"].shape == (1, 4)


@pytest.mark.parametrize(
    ("text", "separates", "is_open"),
    [
        (b"a<think>\n", None, True),
        (b"a<think>\n", False, True),
        (b"a<think>\n", True, True),
        (b"a", True, False),
    ],
)
def test_a_text_s_reasoning_is_told_apart_where_the_client_says_so(
    tokenizer: Any, text: bytes, separates: bool | None, is_open: bool | None
) -> None:
    values: dict[TensorSpec, Any] = {contract.TEXT_INPUT: text}
    if separates is not None:
        values[contract.SEPARATE_REASONING] = separates
    (response,) = encode(tokenizer, [request(values)])
    assert info_of(response) == PromptInfo(is_open, separates_reasoning=bool(separates))


def test_tokenizer_tells_its_build(
    adapter: Callable[[str], ModuleType], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Manifest, "load", lambda path: SimpleNamespace(identity=f"of {path.parent.name}/{path.name}"))
    model = adapter("tokenizer").TritonPythonModel()
    model.initialize(arguments(directory, "m-tokenizer"))
    asked = request({contract.TEXT_INPUT: "x"}, describe_build="1")
    (answer,) = encode(model, [asked])
    assert answer.tensors["prompt_info"].tolist() == [["of m-engine/3"]] and list(answer.tensors) == ["prompt_info"]
    model.finalize()


def test_tokenizer_faults_cost_one_request(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good, odd = request({contract.TEXT_INPUT: b"good"}), request({contract.TEXT_INPUT: b"odd"})

    def inputs() -> list[Tensor]:
        raise RuntimeError("the shared memory\nhas gone")

    monkeypatch.setattr(odd, "inputs", inputs)
    before, bad, after = encode(tokenizer, [good, odd, good])
    assert error_of(bad).message_ == "the prompt can't be encoded: the shared memory has gone"
    assert before.error is None and after.error is None


def test_a_prompt_that_the_tokenizer_s_library_chokes_on_costs_the_others_nothing(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_prompts = tokenizer._tokenizer.encode_prompts

    def chokes(prompts: list[Any]) -> list[Any]:
        if any(prompt.text == "odd" for prompt in prompts):
            raise RuntimeError("a panic\nin the library")
        ids: list[Any] = encode_prompts(prompts)
        return ids

    monkeypatch.setattr(tokenizer._tokenizer, "encode_prompts", chokes)
    requests = [request({contract.TEXT_INPUT: text}) for text in (b"good", b"odd", b"also good")]
    tokenizer.execute(requests)
    wait_until(lambda: all(one.sender.is_final for one in requests))
    before, bad, after = (one.sender.responses[0] for one in requests)
    assert error_of(bad).message_ == "the prompt can't be encoded: a panic in the library"
    assert before.error is None and before.tensors["input_ids"].shape == (1, 4)
    assert after.error is None and after.tensors["input_ids"].shape[1] > 4


def test_a_long_prompt_holds_up_no_other(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    release, encode_prompts = threading.Event(), tokenizer._tokenizer.encode_prompts

    def slow(prompts: list[Any]) -> Any:
        assert len(prompts[0].text) < 1000 or release.wait(20)
        return encode_prompts(prompts)

    monkeypatch.setattr(tokenizer._tokenizer, "encode_prompts", slow)
    number = 4
    long = [request({contract.TEXT_INPUT: b"a" * 50_000}) for _ in range(number)]
    tokenizer.execute(long)
    (short,) = encode(tokenizer, [request({contract.TEXT_INPUT: b"ab"})])
    assert short.tensors["input_ids"].shape == (1, 2) and not any(one.sender.is_final for one in long)
    release.set()
    wait_until(lambda: all(one.sender.is_final for one in long))
    assert all(one.sender.responses[0].tensors["input_ids"].shape == (1, 50_000) for one in long)


def test_too_many_long_prompts_are_refused(
    adapter: Callable[[str], ModuleType], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(tokenizer, "_slow", LowPriorityPool(1, 1, "tokenizer"))
    monkeypatch.setattr(tokenizer, "_answer", lambda jobs: release.wait(20))
    requests = [request({contract.TEXT_INPUT: b"a" * 50_000}) for _ in range(3)]
    tokenizer.execute(requests)
    (error,) = (one.sender.responses[0].error for one in requests if one.sender.is_final)
    assert error is not None and error.code_ == TritonError.UNAVAILABLE
    assert error.message_ == "too many requests wait for the tokenizer; retry later"
    release.set()


def test_texts_are_measured_before_they_are_encoded(
    adapter: Callable[[str], ModuleType], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapter("tokenizer").TritonPythonModel()
    monkeypatch.setattr(adapter("tokenizer"), "max_prompt_tokens", lambda *_: 100)
    model.initialize(arguments(directory, "m-tokenizer"))
    monkeypatch.setattr(Tokenizer, "encode_prompts", lambda *_: [])  # whatever is too long never comes there
    limit = model._tokenizer.max_prompt_bytes
    assert limit is not None and limit < 10_000
    long = json.dumps([{"role": "user", "content": "a" * limit}]).encode()
    many = json.dumps([{"role": "user", "content": "a"}] * 50_000).encode()
    values: list[dict[TensorSpec, Any]] = [
        {contract.TEXT_INPUT: b"a" * (limit + 1)}, {contract.TEXT_INPUT: b"a" * 5_000_000},
        {contract.MESSAGES: long}, {contract.MESSAGES: many},
    ]  # fmt: skip
    for response in encode(model, [request(one) for one in values]):
        assert response.error is not None and response.error.code_ == TritonError.INVALID_ARG
        assert " bytes, must have at most " in response.error.message_ or "more than" in response.error.message_
    model.finalize()


@pytest.mark.parametrize(
    "values",
    [
        {contract.TEXT_INPUT: b""}, {contract.TEXT_INPUT: b"a" * 40_000 + b"\xff"}, {contract.MESSAGES: b"[" * 40_000},
        {contract.MESSAGES: b'[{"role": "user", "content": 5}]'}, {contract.TEXT_INPUT: b"a", contract.MESSAGES: b"[]"},
    ],
)  # fmt: skip
def test_what_was_refused_is_forgotten_at_once(tokenizer: Any, values: dict[TensorSpec, Any]) -> None:
    """Errors that are kept with their frames would keep it until the garbage collector looks at old objects."""
    gc.collect()
    gc.disable()
    try:
        sent = request(values)
        arrays = [weakref.ref(own.as_numpy()) for own in sent.inputs()]
        (response,) = encode(tokenizer, [sent])
        assert error_of(response).code_ == TritonError.INVALID_ARG
        del sent
        wait_until(lambda: not any(array() is not None for array in arrays))
    finally:
        gc.enable()


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
    from deepseek_triton.ensemble.text.tokenizer import Tokenizer

    ids: list[int] = Tokenizer.from_directory(directory / "3").encode(text).tolist()
    return ids


def generated(ids: list[int], stream: int = 1, reason: Any = None, **more: Any) -> Request:
    """A response of the engine, about one sequence."""
    update = Update(0, tuple(ids), 7, reason or None)
    progress = Progress(stream, (update,), num_input_tokens=5, is_last=bool(reason), **more)
    return from_engine(progress)


def from_engine(progress: Progress) -> Request:
    return request({contract.OUTPUT_IDS: progress.ids, contract.PROGRESS: sealed(progress.to_json(), progress.ids)})


def sealed_without_a_server(text: str, ids: list[int]) -> bytes:
    return Seal(bytes(32)).close(text.encode(), np.array(ids, np.int32).tobytes())


def sealed(text: str, ids: list[int]) -> bytes:
    return model_seal("m", "3").close(text.encode("latin-1"), np.array(ids, np.int32).tobytes())


def texts(model: Any, *requests: Request) -> list[str]:
    assert model.execute(list(requests)) is None
    found = []
    for one in requests:
        (response,) = one.sender.responses
        assert one.sender.is_final
        check_outputs(response, contract.ALWAYS_OUTPUTS)
        found.append(response.tensors["text_output"][0].decode())
    return found


def test_detokenizer_passes_progress_on(detokenizer: Any, directory: Path) -> None:
    ended = generated(ids_of(directory, "end"), reason="length")
    assert texts(detokenizer, ended) == ["end"]
    assert {name: array.flat[0] for name, array in ended.sender.responses[0].tensors.items()} == {
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
    pieces = [generated([token], 1, "stop" if i == len(ids) - 1 else None) for i, token in enumerate(ids)]
    assert texts(detokenizer, *pieces) == ["", "", "日", "", "", "本"]


def test_detokenizer_sends_side_by_side_but_each_stream_s_own_in_order(
    detokenizer: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow `send` doesn't delay other streams; what can't be sent isn't acknowledged."""
    receiver = AcknowledgementReceiver(pipe_path("m", "3"))
    is_fast_sent, order = threading.Event(), list[tuple[int, bytes]]()
    ids = {stream: ids_of(directory, f"{stream}{stream}{stream}") for stream in (0, 1, 2)}
    batch = [(stream, generated([token], stream)) for tokens in zip(*ids.values(), strict=True)
             for stream, token in zip(ids, tokens, strict=True)]  # fmt: skip
    for stream, one in batch:

        def send(response: Response, flags: int, stream: int = stream) -> None:
            if stream == 0:
                assert is_fast_sent.wait(10), "the others wait for it"
            if stream == 2:
                raise RuntimeError("the client has gone")
            order.append((stream, response.tensors["text_output"][0]))
            if stream == 1:
                is_fast_sent.set()

        monkeypatch.setattr(one.sender, "send", send)
    detokenizer.execute([one for _, one in batch])
    for stream in (0, 1):
        assert b"".join(text for owner, text in order if owner == stream).decode() == 3 * str(stream)
    assert order[0][0] == 1
    assert sorted(receiver.drain()) == [0, 0, 0, 1, 1, 1]
    receiver.close()


def test_detokenizer_forgets_a_stream_that_ended(detokenizer: Any, directory: Path) -> None:
    half = ids_of(directory, "é")[:1]
    texts(detokenizer, generated(half, 1))
    assert texts(detokenizer, generated([], 1, "cancelled")) == ["\ufffd"]
    assert not detokenizer._streams
    assert texts(detokenizer, generated(ids_of(directory, "a"), 1)) == ["a"]


def test_detokenizer_remembers_a_stream_until_its_last_sequence_has_ended(detokenizer: Any, directory: Path) -> None:
    echo = StreamHead(PromptInfo(), tuple(ids_of(directory, "> ")))
    first = Progress(1, (Update(0, tuple(ids_of(directory, "a")), 1, "stop"),), echo, num_input_tokens=5)
    assert texts(detokenizer, from_engine(first)) == ["> a"]
    second = Progress(1, (Update(1, tuple(ids_of(directory, "b")), 1, "stop"),), num_input_tokens=5, is_last=True)
    assert texts(detokenizer, from_engine(second)) == ["> b"]
    assert not detokenizer._streams


def test_detokenizer_s_memory_of_streams_that_never_end_is_bounded(
    adapter: Callable[[str], ModuleType], detokenizer: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter("detokenizer"), "MAX_STREAMS", 3)
    head, tail = ids_of(directory, "é")
    for stream in range(3):
        texts(detokenizer, generated([head], stream))
    texts(detokenizer, generated([], 0))  # 0 was used last, 1 is the oldest now
    texts(detokenizer, generated([head], 3))
    assert list(detokenizer._streams) == [2, 0, 3]
    assert texts(detokenizer, generated([tail], 0)) == ["é"]


def test_detokenizer_acknowledges_each_response_and_each_heartbeat(detokenizer: Any) -> None:
    texts(detokenizer, generated([5], 9))  # no engine listens: that is no error
    receiver = AcknowledgementReceiver(pipe_path("m", "3"))
    heartbeat = from_engine(Progress(7))
    detokenizer.execute([generated([5], 9), generated([5], 2**63), heartbeat, generated([], 9, "stop")])
    assert sorted(receiver.drain()) == [7, 9, 9, 2**63]
    assert heartbeat.sender.is_final and not heartbeat.sender.responses, "a client sees none"
    receiver.close()


HEAD = "[1,null,true,false,false,null"  # of a Progress, as far as its updates


def test_nobody_but_the_engine_can_spoil_or_acknowledge_a_stream(detokenizer: Any, directory: Path) -> None:
    receiver = AcknowledgementReceiver(pipe_path("m", "3"))
    first, second = ids_of(directory, "é")
    assert texts(detokenizer, generated([first], 7)) == [""]
    ended = Progress(7, (Update(0, (), 1, "stop"),), num_input_tokens=5, is_last=True)
    plain = ended.to_json().encode()
    forged = [plain, b"0" * 32 + plain, Seal(bytes(32)).close(plain), sealed(ended.to_json(), [1]), b""]
    for progress in forged:
        odd = request({contract.OUTPUT_IDS: [], contract.PROGRESS: progress})
        detokenizer.execute([odd])
        error = odd.sender.responses[0].error
        assert error is not None and "progress must be what the engine gives" in error.message_
    assert texts(detokenizer, generated([second], 7, "stop")) == ["é"]
    assert receiver.drain() == [7, 7]
    receiver.close()


@pytest.mark.parametrize(
    "progress",
    [
        "", "{}", "5", "null", "[]", "[" * 100_000, '["x",null,true,false,false,null]',
        "[-1,null,true,false,false,null]",
        "[1e3,null,true,false,false,null]", f"[{2**64},null,true,false,false,null]", "[1,null,true,false,false,7]",
        f"{HEAD},[0,1]]", f"{HEAD},[[],0,1,null,0,null,null]]", f"{HEAD},[0,0,1,7,0,null,null]]",
        f"{HEAD},[0,0,{2**40},null,0,null,null]]", f"{HEAD},[0,0,1,null,0,[[0.5],0],null]]", "\xff",
    ],
)  # fmt: skip
def test_whoever_calls_the_detokenizer_directly_gets_an_error_and_the_others_their_text(
    detokenizer: Any, directory: Path, progress: str
) -> None:
    receiver = AcknowledgementReceiver(pipe_path("m", "3"))
    odd = request({contract.OUTPUT_IDS: [1], contract.PROGRESS: sealed(progress, [1])})
    good = [generated(ids_of(directory, text), stream, "stop") for stream, text in ((2, "a"), (3, "b"))]
    detokenizer.execute([good[0], odd, good[1]])
    assert odd.sender.is_final
    (response,) = odd.sender.responses
    assert response.error is not None and response.error.code_ == TritonError.INVALID_ARG
    assert "progress must be what the engine gives" in response.error.message_
    assert [one.sender.responses[0].tensors["text_output"][0] for one in good] == [b"a", b"b"]
    assert receiver.drain() == [2, 3]
    receiver.close()


# The engine


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(max_num_seqs=2, max_seq_len=64, vocab_size=VOCAB_SIZE)


@pytest.fixture
def engine(
    adapter: Callable[[str], ModuleType], directory: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    module = adapter("engine")
    loaded: list[tuple[Path, EngineSettings]] = []

    def load_runner(path: Path, settings: EngineSettings) -> tuple[Any, FakeRunner]:
        loaded.append((path, settings))
        return SimpleNamespace(end_ids=(0,), sampling={}), runner

    monkeypatch.setattr(module, "load_model", load_runner)
    model = module.TritonPythonModel()
    parameters = {"max_num_seqs": {"string_value": "2"}, "max_num_batched_tokens": {"string_value": "4"}}
    model.initialize(arguments(directory, "m-engine", parameters=parameters))
    assert loaded == [(directory / "3", EngineSettings(max_num_seqs=2, max_num_batched_tokens=4))]
    yield model
    if not runner.is_closed:
        model.finalize()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def progresses(sender: ResponseSender) -> list[Progress]:
    """Every response of one request, when the last has come."""
    wait_until(lambda: sender.is_final)
    for response in sender.responses:
        check_outputs(response, (contract.OUTPUT_IDS, contract.PROGRESS))
    return [progress_of(response) for response in sender.responses]


def progress_of(response: Response) -> Progress:
    ids, text = response.tensors["output_ids"], response.tensors["progress"][0, 0]
    if not text.startswith(b"["):  # not a direct call's
        text = model_seal("m", "3").open(text, ids.tobytes())
    return Progress.from_json(text, ids[0].tolist())


def answers(sender: ResponseSender) -> list[int]:
    return [token for progress in progresses(sender) for token in progress.ids]


def expected(count: int) -> list[int]:
    return expected_tokens(PROMPT, count, VOCAB_SIZE)


PROMPT = [5, 6, 7]


def test_engine_answers_in_one_response_or_as_a_stream(engine: Any) -> None:
    whole = request({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 6})
    stream = request({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 6, contract.STREAM: True})
    assert engine.execute([whole, stream]) is None
    assert answers(whole.sender) == answers(stream.sender) == expected(6)
    assert len(whole.sender.responses) == 1 and len(stream.sender.responses) > 1
    streams = set()
    for sender in (whole.sender, stream.sender):
        found = progresses(sender)
        assert [progress.is_last for progress in found] == [False] * (len(found) - 1) + [True]
        assert [update.finish_reason for progress in found for update in progress.updates][-1] == "length"
        assert all(update.finish_reason is None for progress in found[:-1] for update in progress.updates)
        assert found[-1].num_input_tokens == 3 and found[-1].updates[0].num_output_tokens == 6
        streams |= {progress.stream_id for progress in found}
    assert streams == {0}, "whoever calls the engine directly learns no stream's id"


def test_stream_ids_can_t_be_guessed(engine: Any) -> None:
    asked = [told_by_tokenizer() for _ in range(20)]
    engine.execute(asked)
    streams = {progress.stream_id for one in asked for progress in progresses(one.sender)}
    assert len(streams) == 20 and len({stream >> 56 for stream in streams}) > 5
    gaps = {second - first for first, second in itertools.pairwise(sorted(streams))}
    assert min(gaps) > 2**32


def told_by_tokenizer(info: PromptInfo | None = None, **more: Any) -> Request:
    """A request as it comes through the ensemble."""
    text = sealed((info or PromptInfo()).to_json(), PROMPT)
    options = {contract.OPTIONS[name]: value for name, value in {"max_tokens": 3, **more}.items()}
    return request({contract.INPUT_IDS: PROMPT, contract.PROMPT_INFO: text, **options})


def test_a_prompt_info_that_the_tokenizer_didn_t_write_is_refused(engine: Any) -> None:
    plain = PromptInfo().to_json()
    for text in (plain.encode(), Seal(bytes(32)).close(plain.encode()), sealed(plain, [5, 6, 8]), b"", b"5"):
        forged = request({contract.INPUT_IDS: PROMPT, contract.PROMPT_INFO: text})
        engine.execute([forged])
        error = forged.sender.responses[0].error
        assert error is not None and error.message_ == "prompt_info must be what the tokenizer gives; leave it out"
        assert error.code_ == TritonError.INVALID_ARG


def test_time_limits_count_from_the_arrival_in_the_tokenizer(engine: Any) -> None:
    late = told_by_tokenizer(PromptInfo(arrived_at=time.monotonic() - 0.5), timeout_ms=400)
    in_time = told_by_tokenizer(PromptInfo(arrived_at=time.monotonic() - 0.5), timeout_ms=60_000)
    engine.execute([late, in_time])
    assert answers(in_time.sender) == expected(3)
    wait_until(lambda: late.sender.is_final)
    error = late.sender.responses[-1].error
    assert error is not None and "the request timed out after" in error.message_


def test_the_first_response_says_how_the_stream_is_to_be_read(engine: Any) -> None:
    info = PromptInfo(True, True)
    values = {contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 3, contract.STREAM: True}
    direct = request(values)
    told = told_by_tokenizer(info, stream=True)
    echoed = told_by_tokenizer(info, stream=True, exclude_input_in_output=False)
    engine.execute([direct, told, echoed])
    heads = [[progress.head for progress in progresses(one.sender)] for one in (direct, told, echoed)]
    expected = [None, *(StreamHead(info, ids, counts_new_tokens=True) for ids in ((), tuple(PROMPT)))]
    assert [head[0] for head in heads] == expected
    assert all(later is None for head in heads for later in head[1:])


def test_engine_tells_what_was_asked_for(engine: Any) -> None:
    asked = request(
        {
            contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 3,
            contract.OPTIONS["temperature"]: 1.0, contract.OPTIONS["seed"]: 1,
            contract.OPTIONS["num_return_sequences"]: 2, contract.OPTIONS["return_num_input_tokens"]: False,
            contract.OPTIONS["return_num_output_tokens"]: False, contract.OPTIONS["return_log_probs"]: True,
            contract.OPTIONS["return_perf_metrics"]: True,
        }
    )  # fmt: skip
    engine.execute([asked])
    (progress,) = progresses(asked.sender)
    assert (progress.num_input_tokens, progress.shows_output_tokens, progress.shows_index) == (None, False, True)
    assert [update.index for update in progress.updates] == [0, 1]
    for update in progress.updates:
        assert update.log_probs is not None and len(update.log_probs.tokens) == 3 and update.log_probs.top == ()
        assert update.times_ns is not None and list(update.times_ns) == sorted(update.times_ns)
        assert update.times_ns[0] > 0


def batch(values: dict[TensorSpec, list[Any]], parameters: str = "") -> Request:
    """A request of several prompts: a tensor's values, one for each."""
    tensors = [Tensor(spec.name, np.array(rows, NUMPY_DTYPES[spec.dtype])) for spec, rows in values.items()]
    sent = Request(*tensors)
    sent.parameters = lambda: parameters  # type: ignore[method-assign]
    return sent


def through_the_ensemble(num_prompts: int, **values: Any) -> dict[TensorSpec, list[Any]]:
    """Prompts as the tokenizer gives them, the later ones longer; options with the same value for each."""
    prompts = [PROMPT + [8] * i + [-1] * (num_prompts - 1 - i) for i in range(num_prompts)]
    infos = [[sealed(PromptInfo().to_json(), PROMPT + [8] * i)] for i in range(num_prompts)]
    options = {spec: [[values[spec.name]]] * num_prompts for spec in contract.ENGINE.inputs if spec.name in values}
    return {contract.INPUT_IDS: prompts, contract.PROMPT_INFO: infos, **options}


def test_engine_answers_each_prompt_of_a_request_apart(engine: Any) -> None:
    asked = batch(through_the_ensemble(3, max_tokens=4))
    engine.execute([asked])
    found = progresses(asked.sender)
    assert [progress.is_last for progress in found] == [True] * 3 and asked.sender.is_final
    heads = {progress.head.batch_index: progress for progress in found if progress.head is not None}
    assert sorted(index for index in heads if index is not None) == [0, 1, 2]
    for index, progress in heads.items():
        prompt = PROMPT + [8] * (index or 0)
        assert (progress.num_input_tokens, progress.ids) == (len(prompt), expected_tokens(prompt, 4, VOCAB_SIZE))


def test_one_bad_prompt_refuses_the_whole_request(engine: Any) -> None:
    values = through_the_ensemble(2, max_tokens=4)
    bad, good = batch({**values, contract.OPTIONS["max_tokens"]: [[4], [0]]}), batch(values)
    engine.execute([bad, good])
    (response,) = bad.sender.responses
    assert bad.sender.is_final and response.error is not None and "max_tokens is 0" in response.error.message_
    assert len(progresses(good.sender)) == 2


def test_a_prompt_that_fails_ends_the_others_of_its_request(engine: Any, runner: FakeRunner) -> None:
    runner.fail_next = RuntimeError("out of luck")
    failed = batch(through_the_ensemble(2, max_tokens=40))
    engine.execute([failed])
    wait_until(lambda: failed.sender.is_final)
    assert failed.sender.responses[-1].error is not None
    wait_until(lambda: not engine._loop._requests)


@pytest.mark.parametrize(("parameters", "num_responses"), [('{"user-agent": "grpc"}', 2), ("", 1), ("{}", 1)])
def test_over_grpc_each_sequence_has_a_response_of_its_own(engine: Any, parameters: str, num_responses: int) -> None:
    options = {"max_tokens": 3, "temperature": 1.0, "seed": 1, "num_return_sequences": 2}
    asked = batch(through_the_ensemble(1, **options), parameters)
    engine.execute([asked])
    found = progresses(asked.sender)
    assert [update.index for progress in found for update in progress.updates] == [0, 1]
    assert [progress.is_last for progress in found] == [False, True][-num_responses:] and found[0].head is not None
    assert all(progress.shows_index for progress in found)


def test_the_head_says_what_old_clients_read(engine: Any) -> None:
    own = batch(through_the_ensemble(1, max_tokens=3), '{"stop_key": "secret"}')
    others = batch(through_the_ensemble(1, max_tokens=3))
    nvidias = batch(through_the_ensemble(1, max_tokens=3, beam_width=1, return_num_output_tokens=True))
    engine.execute([own, others, nvidias])
    heads = [progresses(one.sender)[0].head for one in (own, others, nvidias)]
    assert heads[0] == StreamHead(PromptInfo(), tells_details=True)
    assert heads[1] == StreamHead(PromptInfo(), (), counts_new_tokens=True)
    assert heads[2] == StreamHead(PromptInfo(), (), counts_new_tokens=True, batch_index=0)


@pytest.mark.slow
def test_engine_hands_the_sampling_parameters_on(engine: Any) -> None:
    def tokens(seed: int) -> list[int]:
        sampled = request(
            {
                contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 20, contract.OPTIONS["temperature"]: 5.0,
                contract.OPTIONS["top_k"]: 50, contract.OPTIONS["top_p"]: 0.9, contract.OPTIONS["seed"]: seed,
            }
        )  # fmt: skip
        engine.execute([sampled])
        return answers(sampled.sender)

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(1) != expected(20)
    for count, token in enumerate(tokens(1)):
        likeliest = next_token([*PROMPT, *tokens(1)[:count]], VOCAB_SIZE)
        assert token < 50 or token == likeliest, "of FakeRunner's equal logits the lower ids come first"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "input_ids is missing"),
        ({contract.INPUT_IDS: []}, "the prompt is empty"),
        ({contract.INPUT_IDS: [1] * 64}, "the prompt has 64 tokens, the context holds 64; shorten the prompt"),
        ({contract.INPUT_IDS: [1, 320]}, "input_ids must lie in 0 … 319, got 320"),
        ({contract.INPUT_IDS: [-1]}, "input_ids must lie in 0 … 319, got -1"),
        ({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 0}, "max_tokens is 0"),
        ({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: -1}, "max_tokens is -1"),
        ({contract.INPUT_IDS: PROMPT, contract.OPTIONS["temperature"]: -1.0}, "temperature is -1.0"),
        ({contract.INPUT_IDS: PROMPT, contract.OPTIONS["temperature"]: np.nan}, "temperature is nan"),
        ({contract.INPUT_IDS: PROMPT, contract.OPTIONS["top_p"]: np.nan}, "top_p is nan"),
        ({contract.INPUT_IDS: PROMPT, contract.OPTIONS["top_p"]: 0.0}, "top_p is 0.0"),
        ({contract.INPUT_IDS: PROMPT, contract.OPTIONS["top_k"]: -2}, "top_k is -2"),
        (
            {contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: [1, 2]},
            "max_tokens holds 2 values, must hold one",
        ),
        (
            {contract.INPUT_IDS: PROMPT, contract.PROMPT_INFO: sealed_without_a_server("5", PROMPT)},
            "prompt_info must be what the tokenizer gives",
        ),
        ({contract.INPUT_IDS: PROMPT, contract.OPTIONS["stop_words"]: b"\xff"}, "stop_words is not UTF-8"),
        (
            {contract.INPUT_IDS: PROMPT, contract.OPTIONS["guided_decoding_guide_type"]: b"nothing"},
            "guided_decoding_guide_type is 'nothing'",
        ),
        (
            {
                contract.INPUT_IDS: PROMPT,
                contract.OPTIONS["guided_decoding_guide_type"]: b"regex",
                contract.OPTIONS["guided_decoding_guide"]: b"(",
            },
            "the regex is invalid",
        ),
        ({contract.INPUT_IDS: PROMPT, contract.OPTIONS["priority"]: 9}, "priority is 9, must be 1 (most urgent) to 3"),
        ({contract.STOP: True}, "stop needs the id of the request to stop"),
        ({contract.STOP: [True, True]}, "stop holds 2 values"),
    ],
)
def test_engine_answers_a_bad_request_and_the_others_beside_it(
    engine: Any, values: dict[TensorSpec, Any], message: str
) -> None:
    bad, good = request(values), request({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 4})
    engine.execute([bad, good])
    wait_until(lambda: bad.sender.is_final)
    assert len(bad.sender.responses) == 1
    error = bad.sender.responses[0].error
    assert error is not None and message in error.message_ and error.code_ == TritonError.INVALID_ARG
    assert answers(good.sender) == expected(4)


def test_guides_that_compile_slowly_hold_up_nobody(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow(guide: str) -> str:
        assert release.wait(20)
        return choice(guide)

    choice = GRAMMARS["choice"]
    monkeypatch.setitem(GRAMMARS, "regex", slow)

    def guided(kind: bytes, guide: bytes) -> Request:
        options = {"guided_decoding_guide_type": kind, "guided_decoding_guide": guide, "max_tokens": 4}
        return request({contract.INPUT_IDS: PROMPT, **{contract.OPTIONS[name]: v for name, v in options.items()}})

    costly = [guided(b"regex", json.dumps([f"{number}"]).encode()) for number in range(MAX_CONCURRENT - 1)]
    others = [request({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 4}), guided(b"choice", b'["a"]')]
    stop = request({contract.STOP: True}, "nobody")
    same = [guided(b"regex", b'["0"]') for _ in range(20)]  # wait for the first one's guide
    engine.execute([*costly, *same, *others, stop])
    wait_until(lambda: others[0].sender.is_final and others[1].sender.is_final and stop.sender.is_final)
    assert not any(one.sender.is_final for one in [*costly, *same])
    release.set()
    wait_until(lambda: all(one.sender.is_final for one in [*costly, *same]))
    assert all(one.sender.responses[-1].error is None for one in [*costly, *same])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("guided_decoding_guide", [b"x" * 70_000]), ("guided_decoding_guide_type", [b"x" * 300]),
        ("stop_words", [b"x" * 70_000]), ("stop_words", [b"x"] * 5000), ("bad_words", [b"x" * 40_000] * 2),
    ],
)  # fmt: skip
def test_the_engine_measures_texts_before_it_reads_them(engine: Any, name: str, values: list[bytes]) -> None:
    odd = request({contract.INPUT_IDS: PROMPT, contract.OPTIONS[name]: values})
    engine.execute([odd])
    error = odd.sender.responses[0].error
    assert error is not None and error.code_ == TritonError.INVALID_ARG
    assert error.message_.startswith(f"{name} h") and " at most " in error.message_ and len(error.message_) < 100


def test_engine_failures_of_the_runner_end_one_request(engine: Any, runner: FakeRunner) -> None:
    runner.fail_next = RuntimeError("out of luck")
    failed = request({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 4})
    engine.execute([failed])
    wait_until(lambda: failed.sender.is_final)
    error = failed.sender.responses[-1].error
    assert error is not None and "prefill failed: out of luck" in error.message_
    assert error.code_ == TritonError.INTERNAL
    later = request({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 4})
    engine.execute([later])
    assert answers(later.sender) == expected(4)


def test_engine_answers_a_request_that_it_can_t_even_read(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    odd, good = request({}), request({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 4})

    def inputs() -> list[Tensor]:
        raise RuntimeError("the shared memory\nhas gone")

    monkeypatch.setattr(odd, "inputs", inputs)
    engine.execute([odd, good])
    error = odd.sender.responses[0].error
    assert odd.sender.is_final and error is not None and error.code_ == TritonError.INTERNAL
    assert error.message_ == "the request can't be taken in: the shared memory has gone"
    assert answers(good.sender) == expected(4)


def test_engine_publishes_its_numbers(engine: Any) -> None:
    families = sys.modules["triton_python_backend_utils"].MetricFamily
    done = request({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 4})
    engine.execute([done])
    answers(done.sender)
    engine.finalize()
    assert families.value("deepseek_generated_tokens_total", model="m", version="3") == 4
    assert families.value("deepseek_slots", model="m", version="3") == 2
    assert families.value("deepseek_slots_used", model="m", version="3") == 0


def test_engine_tells_its_context(engine: Any) -> None:
    asked = request({contract.DESCRIBE: True})
    engine.execute([asked])
    (answer,) = asked.sender.responses
    assert asked.sender.is_final and answer.error is None
    check_outputs(answer, (contract.MAX_SEQ_LEN,))
    assert answer.tensors["max_seq_len"].tolist() == [[64]]


class Gate(FakeRunner):
    """Decodes while `is_open`: a sequence stays as long as the test needs it."""

    is_open = False

    def decode(self, ids: Any, positions: Any) -> Any:
        wait_until(lambda: self.is_open)
        return super().decode(ids, positions)


class TestWithAGate:
    @pytest.fixture
    def runner(self) -> FakeRunner:
        return Gate(max_num_seqs=2, max_seq_len=64, vocab_size=VOCAB_SIZE)

    def start(
        self, engine: Any, request_id: str = "", *, acknowledge: bool = False, stop_key: str | None = None
    ) -> Request:
        values = {contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 50, contract.STREAM: True}
        info = {contract.PROMPT_INFO: sealed(PromptInfo().to_json(), PROMPT)} if acknowledge else {}
        parameters = {} if stop_key is None else {contract.STOP_KEY: stop_key}
        started = request({**values, **info}, request_id, **parameters)
        engine.execute([started])
        wait_until(lambda: started.sender.responses)
        return started

    @pytest.mark.parametrize(
        ("request_id", "key", "other_key"),
        [("one", "secret", "secret"), ("0123456789abcdef" * 2, None, None), ("0123456789abcdef" * 2, "a", None)],
    )
    def test_a_request_is_stopped_by_whoever_knows_its_key_or_its_random_id(
        self, engine: Any, runner: Gate, request_id: str, key: str | None, other_key: str | None
    ) -> None:
        one = self.start(engine, request_id, stop_key=key)
        other = request({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 5})
        engine.execute([other])
        stop = request(
            {contract.STOP: True}, request_id, **({} if other_key is None else {contract.STOP_KEY: other_key})
        )
        engine.execute([stop])
        runner.is_open = True
        assert answers(stop.sender) == []
        assert progresses(stop.sender)[0].updates[0].finish_reason == "cancelled"
        tokens = answers(one.sender)
        assert tokens == expected(len(tokens)) and len(tokens) < 50
        assert progresses(one.sender)[-1].updates[0].finish_reason == "cancelled"
        assert answers(other.sender) == expected(5)

    @pytest.mark.parametrize("key", [None, "secret"])
    @pytest.mark.parametrize("guess", [None, "", "guess", 5, ["secret"], {"secret": "secret"}])
    def test_nobody_stops_the_request_of_another_by_guessing_its_id(
        self, engine: Any, runner: Gate, key: str | None, guess: Any
    ) -> None:
        one = self.start(engine, "1", stop_key=key)
        stop = request({contract.STOP: True}, "1", **({} if guess is None else {contract.STOP_KEY: guess}))
        engine.execute([stop])
        runner.is_open = True
        assert answers(stop.sender) == []
        assert answers(one.sender) == expected(50)

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
        assert progresses(started.sender)[-1].updates[0].finish_reason == "cancelled"
        assert started.sender.num_polls <= 3

    def test_through_an_ensemble_acknowledgements_are_awaited_and_nobody_is_asked(
        self, engine: Any, runner: Gate
    ) -> None:
        started = self.start(engine, acknowledge=True)
        sender = AcknowledgementSender(pipe_path("m", "3"))
        runner.is_open = True
        while not started.sender.is_final:
            wait_until(lambda: len(started.sender.responses) > 0)
            sender.send([progress_of(started.sender.responses[-1]).stream_id])
            time.sleep(0.001)
        sender.close()
        assert answers(started.sender) == expected(50)
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

    def test_a_queue_that_is_full_is_told_apart_from_a_request_at_fault(
        self, engine: Any, runner: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.start(engine)
        monkeypatch.setattr(engine._loop, "_max_queue_size", 0)
        refused = request({contract.INPUT_IDS: PROMPT})
        engine.execute([refused])
        error = refused.sender.responses[0].error
        assert error is not None and error.code_ == TritonError.UNAVAILABLE and "queue is full" in error.message_
        runner.is_open = True
