"""One request's sample, from a client whose answer is known."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import pytest

from deepseek_triton.clients.api import Chunk, GenerateRequest, Generation
from deepseek_triton.clients.errors import RequestRejected, RequestTimeout
from deepseek_triton.loadtest.exchange import Recorder, exchange

REQUEST = GenerateRequest(prompt="a", max_tokens=6)
CHUNKS = (Chunk("a ", "", 4, 2), Chunk("b c ", "", 4, 5), Chunk("d", "stop", 4, 6))


class FakeClient:
    """Waits 20 ms before each chunk, then raises what it was told to."""

    def __init__(self, chunks: Sequence[Chunk] = CHUNKS, error: Exception | None = None) -> None:
        self._chunks, self._error = chunks, error
        self.is_closed = False

    def stream(self, request: GenerateRequest) -> Generator[Chunk, None, None]:
        try:
            for chunk in self._chunks:
                time.sleep(0.02)
                yield chunk
            if self._error:
                raise self._error
        finally:
            self.is_closed = True

    def generate(self, request: GenerateRequest) -> Generation:
        return Generation.from_chunks(list(self.stream(request)))


def test_a_stream_is_measured_piece_by_piece() -> None:
    recorder, client = Recorder(), FakeClient()
    sample, answer = exchange(client, REQUEST, "grpc-stream", recorder.now() - 1.0, recorder)
    assert answer == Generation("a b c d", "stop", 4, 6)
    assert sample.is_complete and client.is_closed
    assert (sample.num_input_tokens, sample.num_output_tokens, sample.num_first_tokens) == (4, 6, 2)
    assert sample.num_responses == 3
    assert sample.late_s == pytest.approx(1.0, abs=0.1)
    assert sample.first_token_s is not None and 1.02 <= sample.first_token_s < 1.5
    assert sample.latency_s >= sample.first_token_s + 0.04
    assert sample.inter_token_s == pytest.approx((sample.latency_s - sample.first_token_s) / 4)
    assert sample.max_gap_s >= 0.02
    assert sum(recorder.tokens.values()) == 6
    assert (recorder.num_begun, recorder.samples) == (1, [sample])


def test_a_whole_answer_has_no_first_token() -> None:
    recorder = Recorder()
    sample, answer = exchange(FakeClient(), REQUEST, "http", recorder.now(), recorder)
    assert answer is not None and answer.text == "a b c d"
    assert sample.num_responses == 1
    assert sample.first_token_s is None
    assert sample.latency_s >= 0.06


@pytest.mark.parametrize("error", [RequestTimeout("too slow"), RequestRejected("no")])
def test_a_clients_error_is_part_of_the_sample(error: Exception) -> None:
    recorder = Recorder()
    sample, answer = exchange(FakeClient(CHUNKS[:2], error), REQUEST, "grpc-stream", 0.0, recorder)
    assert answer is None
    assert sample.error == f"{type(error).__name__}: {error}"
    assert sample.num_output_tokens == 5
    assert not sample.is_complete
    assert recorder.samples == [sample]


def test_an_answer_that_was_cancelled_is_no_answer() -> None:
    recorder = Recorder()
    sample, answer = exchange(FakeClient([Chunk("a", "cancelled", 1, 1)]), REQUEST, "http-stream", 0.0, recorder)
    assert answer is None
    assert (sample.error, sample.is_complete) == ("", False)


def test_a_bug_is_not_taken_for_the_servers_error() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError):
        exchange(FakeClient([], KeyError("oops")), REQUEST, "http", 0.0, recorder)
    assert (recorder.num_begun, recorder.samples) == (1, [])
