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

from deepseek_triton.ensemble.models.tensors import NUMPY_DTYPES
from deepseek_triton.ensemble.processes.acknowledgements import (
    AcknowledgementReceiver,
    AcknowledgementSender,
    pipe_path,
)
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec
from deepseek_triton.ensemble.protocol.progress import Progress, PromptInfo, StreamHead, Update
from deepseek_triton.ensemble.protocol.settings import EngineSettings
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
    """Keeps what was sent. Nothing may follow the final response: sending raises in Triton, asking crashes it."""

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
def tokenizer(adapter: Callable[[str], ModuleType], directory: Path) -> Iterator[Any]:
    model = adapter("tokenizer").TritonPythonModel()
    model.initialize(arguments(directory, "m-tokenizer"))
    yield model
    model.finalize()


def info_of(response: Response) -> PromptInfo:
    return PromptInfo.from_json(response.tensors["prompt_info"][0, 0])


def test_tokenizer_encodes_text_and_messages(tokenizer: Any) -> None:
    messages = json.dumps([{"role": "user", "content": "hi"}]).encode()
    requests = [request({contract.TEXT_INPUT: b"ab"}), request({contract.MESSAGES: messages})]
    text, chat = tokenizer.execute(requests)
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
    before, bad, after = tokenizer.execute([good, request(values), good])
    assert message in bad.error.message_ and bad.error.code_ == TritonError.INVALID_ARG
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
    (response,) = tokenizer.execute([request(values)])
    assert info_of(response) == PromptInfo(is_open, separates_reasoning=bool(separates))


def test_tokenizer_faults_cost_one_request(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good, odd = request({contract.TEXT_INPUT: b"good"}), request({contract.TEXT_INPUT: b"odd"})

    def inputs() -> list[Tensor]:
        raise RuntimeError("the shared memory\nhas gone")

    monkeypatch.setattr(odd, "inputs", inputs)
    before, bad, after = tokenizer.execute([good, odd, good])
    assert bad.error.message_ == "the prompt can't be encoded: the shared memory has gone"
    assert before.error is None and after.error is None


def test_a_prompt_that_the_tokenizer_s_library_chokes_on_costs_the_others_nothing(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tokenizer._tokenizer.encode_prompts

    def chokes(prompts: list[Any]) -> list[Any]:
        if any(prompt.text == "odd" for prompt in prompts):
            raise RuntimeError("a panic\nin the library")
        ids: list[Any] = encode(prompts)
        return ids

    monkeypatch.setattr(tokenizer._tokenizer, "encode_prompts", chokes)
    requests = [request({contract.TEXT_INPUT: text}) for text in (b"good", b"odd", b"also good")]
    before, bad, after = tokenizer.execute(requests)
    assert bad.error.message_ == "the prompt can't be encoded: a panic in the library"
    assert before.error is None and before.tensors["input_ids"].shape == (1, 4)
    assert after.error is None and after.tensors["input_ids"].shape[1] > 4


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
    return request({contract.OUTPUT_IDS: progress.ids, contract.PROGRESS: progress.to_json().encode()})


def texts(model: Any, *requests: Request) -> list[str]:
    assert model.execute(list(requests)) is None
    found = []
    for one in requests:
        (response,) = one.sender.responses
        assert one.sender.is_final
        check_outputs(response, contract.ALWAYS_OUTPUTS)
        found.append(response.tensors["text_output"][0, 0].decode())
    return found


def test_detokenizer_passes_progress_on(detokenizer: Any, directory: Path) -> None:
    ended = generated(ids_of(directory, "end"), reason="length")
    assert texts(detokenizer, ended) == ["end"]
    assert {name: array[0, 0] for name, array in ended.sender.responses[0].tensors.items()} == {
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
    """Whoever waits longest in `send` holds up nobody else's streams; what can't be sent isn't acknowledged."""
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
            order.append((stream, response.tensors["text_output"][0, 0]))
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
    odd = request({contract.OUTPUT_IDS: [1], contract.PROGRESS: progress.encode("latin-1")})
    good = [generated(ids_of(directory, text), stream, "stop") for stream, text in ((2, "a"), (3, "b"))]
    detokenizer.execute([good[0], odd, good[1]])
    assert odd.sender.is_final
    (response,) = odd.sender.responses
    assert response.error is not None and response.error.code_ == TritonError.INVALID_ARG
    assert "progress must be what the engine gives" in response.error.message_
    assert [one.sender.responses[0].tensors["text_output"][0, 0] for one in good] == [b"a", b"b"]
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
        return SimpleNamespace(end_ids=(0,)), runner

    monkeypatch.setattr(module, "load_runner", load_runner)
    model = module.TritonPythonModel()
    parameters = {"max_num_seqs": {"string_value": "2"}, "max_num_batched_tokens": {"string_value": "4"}}
    model.initialize(arguments(directory, "m-engine", parameters=parameters))
    assert loaded == [(directory / "3", EngineSettings(max_num_seqs=2, max_num_batched_tokens=4))]
    yield model
    if not runner.is_closed:
        model.finalize()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def progresses(sender: ResponseSender) -> list[Progress]:
    """Every response of one request, when the last has come."""
    wait_until(lambda: sender.is_final)
    for response in sender.responses:
        check_outputs(response, contract.ENGINE.outputs)
    return [progress_of(response) for response in sender.responses]


def progress_of(response: Response) -> Progress:
    ids, text = response.tensors["output_ids"], response.tensors["progress"]
    return Progress.from_json(text[0, 0], ids[0].tolist())


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
        assert len({progress.stream_id for progress in found}) == 1
        streams.add(found[0].stream_id)
    assert len(streams) == 2 and max(streams) == min(streams) + 1


def test_the_first_response_says_how_the_stream_is_to_be_read(engine: Any) -> None:
    info = PromptInfo(True, True)
    values = {contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 3, contract.STREAM: True}
    direct = request(values)
    told = request({**values, contract.PROMPT_INFO: info.to_json().encode()})
    echoed = request(
        {**values, contract.PROMPT_INFO: info.to_json().encode(), contract.OPTIONS["exclude_input_in_output"]: False}
    )
    engine.execute([direct, told, echoed])
    heads = [[progress.head for progress in progresses(one.sender)] for one in (direct, told, echoed)]
    assert [head[0] for head in heads] == [None, StreamHead(info), StreamHead(info, tuple(PROMPT))]
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
            {contract.INPUT_IDS: PROMPT, contract.PROMPT_INFO: b"5"},
            "prompt_info is '5', must be what the tokenizer gives",
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
    assert bad.sender.is_final and len(bad.sender.responses) == 1
    error = bad.sender.responses[0].error
    assert error is not None and message in error.message_ and error.code_ == TritonError.INVALID_ARG
    assert answers(good.sender) == expected(4)


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

    def start(self, engine: Any, request_id: str = "", *, acknowledge: bool = False) -> Request:
        values = {contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 50, contract.STREAM: True}
        started = request(
            {**values, **({contract.PROMPT_INFO: PromptInfo().to_json().encode()} if acknowledge else {})}, request_id
        )
        engine.execute([started])
        wait_until(lambda: started.sender.responses)
        return started

    def test_a_request_is_stopped_by_its_id(self, engine: Any, runner: Gate) -> None:
        one, other = self.start(engine, "one"), request({contract.INPUT_IDS: PROMPT, contract.OPTIONS["max_tokens"]: 5})
        engine.execute([other])
        stop = request({contract.STOP: True}, "one")
        engine.execute([stop])
        runner.is_open = True
        assert answers(stop.sender) == []
        assert progresses(stop.sender)[0].updates[0].finish_reason == "cancelled"
        tokens = answers(one.sender)
        assert tokens == expected(len(tokens)) and len(tokens) < 50
        assert progresses(one.sender)[-1].updates[0].finish_reason == "cancelled"
        assert answers(other.sender) == expected(5)

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


def test_stream_ids_of_two_engines_differ(engine: Any) -> None:
    first = next(engine._stream_ids)
    assert 0 <= first < 2**63 and first % 2**32 == 0
