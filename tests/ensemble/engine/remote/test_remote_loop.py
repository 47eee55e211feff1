"""The loop that asks another model: order, ends, time limits, clients that leave, and errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from deepseek_triton.ensemble.engine.remote.loop import RemoteLoop
from deepseek_triton.ensemble.engine.remote.model import RemoteError, RemoteModel, RemoteTokens
from deepseek_triton.ensemble.engine.remote.vllm import read_tokens
from deepseek_triton.ensemble.engine.request_loop import QueueFullError
from deepseek_triton.ensemble.engine.sequence import NEVER, RemoteRequest, Request, Sequence
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.sampling import Sampled, Sampler, SamplingParams
from tests.support.fakes import FakeAcknowledgements, FakeSink

END = 0


class FakeModel:
    """Counts up from the text's number, as the test lets it; "fail" fails, and "cut" ends without a word."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.unwanted: list[str] = []
        self.may_go = threading.Semaphore(10**6)

    def __call__(
        self, text: str, parameters: Mapping[str, Any], is_wanted: Callable[[], bool]
    ) -> Iterator[RemoteTokens]:
        self.asked.append((text, parameters))
        if text == "fail":
            raise RemoteError("vLLM: out of luck")
        for number in range(parameters["max_tokens"] if text != "cut" else 1):
            self.may_go.acquire()
            if not is_wanted():
                self.unwanted.append(text)
                return
            is_last = number == parameters["max_tokens"] - 1
            yield RemoteTokens((Sampled(int(text) + number if text != "cut" else 1),), "length" if is_last else None)


class Remote:
    def __init__(self, max_num_seqs: int = 2, **settings: Any) -> None:
        self.model, self.acknowledgements = FakeModel(), FakeAcknowledgements()
        self.loop = RemoteLoop(
            RemoteModel(max_num_seqs, 64, 320), self.model,
            settings=EngineSettings(**settings), acknowledgements=self.acknowledgements,
        )  # fmt: skip
        self.count = 0

    def submit(self, text: str, priority: int = 2, deadline_s: float | None = None, **params: Any) -> FakeSink:
        self.count += 1
        sink = FakeSink()
        request = Request(
            stream_id=self.count, request_id=f"r{self.count}", prompt_ids=np.array([1, 2]),
            params=SamplingParams(**{"max_tokens": 3, **params}), sink=sink, is_streamed=True, priority=priority,
            stop_key="key", arrived_at=self.loop.clock(), remote=RemoteRequest(text, {}),
            deadline=NEVER if deadline_s is None else self.loop.clock() + deadline_s,
        )  # fmt: skip
        for index in range(request.params.num_return_sequences):
            request.sequences.append(Sequence(request, index, Sampler(request.params, [1, 2], frozenset({END}), index)))
        self.loop.submit(request)
        return sink


@pytest.fixture
def remote() -> Iterator[Remote]:
    made = Remote()
    made.loop.start()
    yield made
    made.loop.close()


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_answers_come_whole_and_in_order(remote: Remote) -> None:
    sinks = [remote.submit(str(start), max_tokens=5) for start in (10, 20, 30, 40)]
    wait(lambda: all(sink.is_finished for sink in sinks))
    assert [sink.ids for sink in sinks] == [list(range(start, start + 5)) for start in (10, 20, 30, 40)]
    assert {sink.finish_reason for sink in sinks} == {"length"}
    metrics = remote.loop.metrics
    assert (metrics.requests_total, metrics.generated_tokens_total, metrics.prompt_tokens_total) == (4, 20, 8)
    assert (metrics.slots, metrics.slots_used, metrics.sequences_waiting) == (2, 0, 0)


def test_an_end_token_ends_the_text_and_is_no_part_of_it(remote: Remote) -> None:
    sink = remote.submit("-2", max_tokens=9)
    wait(lambda: sink.is_finished)
    assert (sink.ids, sink.finish_reason) == ([-2, -1], "stop")


def test_several_answers_have_seeds_of_their_own(remote: Remote) -> None:
    sink = remote.submit("7", num_return_sequences=3, temperature=1.0, seed=5)
    wait(lambda: sink.is_finished)
    assert [sink.ids_of(index) for index in range(3)] == [[7, 8, 9]] * 3
    seeds = {parameters["seed"] for _, parameters in remote.model.asked}
    assert len(seeds) == 3 and 5 in seeds and max(seeds) < 2**63


def test_the_more_urgent_goes_first_and_a_full_queue_refuses() -> None:
    remote = Remote(max_num_seqs=1, max_queue_size=2)
    remote.model.may_go = threading.Semaphore(0)
    remote.loop.start()
    first = remote.submit("1")
    wait(lambda: remote.model.asked)
    sinks = [remote.submit("2"), remote.submit("3", priority=1)]
    wait(lambda: remote.loop.metrics.sequences_waiting == 2)
    with pytest.raises(QueueFullError):
        remote.submit("4")
    remote.model.may_go.release(100)
    wait(lambda: first.is_finished and all(sink.is_finished for sink in sinks))
    assert [text for text, _ in remote.model.asked] == ["1", "3", "2"]
    remote.loop.close()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gone", "stopped", "late"])
def test_what_nobody_wants_is_cancelled_and_gives_its_place_free(way: str) -> None:
    remote = Remote(max_num_seqs=1)
    remote.model.may_go = threading.Semaphore(2)
    remote.loop.start()
    sink = remote.submit("1", max_tokens=50, deadline_s=1.0 if way == "late" else None)
    wait(lambda: len(sink.ids) == 2)
    if way == "gone":
        sink.has_gone = True
    elif way == "stopped":
        done = threading.Event()
        remote.loop.stop("r1", "key", done.set)
        assert done.wait(60)
    wait(lambda: sink.error or sink.is_finished)
    assert sink.finish_reason == (None if way == "late" else "cancelled")
    assert (sink.error or "").startswith("the request timed out after" if way == "late" else "")
    remote.model.may_go.release(1)
    wait(lambda: remote.model.unwanted == ["1"])
    remote.model.may_go.release(100)
    after = remote.submit("5")
    wait(lambda: after.is_finished)
    remote.loop.close()


def test_errors_end_one_request(remote: Remote) -> None:
    failed, cut, whole = remote.submit("fail"), remote.submit("cut"), remote.submit("4")
    wait(lambda: failed.error and cut.error and whole.is_finished)
    assert failed.error == "vLLM: out of luck" and failed.error_kind == "internal"
    assert cut.error == "the model sent no end of the answer"
    assert whole.ids == [4, 5, 6]


def test_a_response_of_vllm_is_read() -> None:
    rows = '[{"7": {"logprob": -1.5, "rank": 2}, "9": {"logprob": -0.5, "rank": 1}}, {"8": {"logprob": -Infinity}}]'
    outputs = {
        "finish_reason": np.array([b"None"], np.object_),
        "logprobs": np.array([rows.encode()], np.object_),
    }
    read = read_tokens(outputs, 1)
    assert read.tokens == (Sampled(7, -1.5, ((9, -0.5),)), Sampled(8, -np.inf, ((8, -np.inf),)))
    assert read.finish_reason is None
    assert read_tokens(outputs | {"logprobs": np.array([b"null"], np.object_)}, 0).tokens == ()
    with pytest.raises(RemoteError, match="vLLM's response can't be read"):
        read_tokens(outputs | {"logprobs": np.array([b"[1]"], np.object_)}, 0)
    with pytest.raises(RemoteError, match="logprobs"):
        read_tokens({"finish_reason": outputs["finish_reason"]}, 0)
