"""Send one request and measure it until its last response: a client in, a sample out.

It knows the clients' interface and a clock, and nothing about Locust: the same code measures under gevent and in a
plain program. An error of the server or the connection is stored in the sample; any other exception is a bug and is
raised.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from deepseek_triton.clients.api import Chunk, GenerateRequest, Generation
from deepseek_triton.clients.errors import ClientError
from deepseek_triton.clients.report import report_inputs
from deepseek_triton.clients.score import Score, ScoreRequest
from deepseek_triton.loadtest.profile import ProtocolName
from deepseek_triton.loadtest.prompts import ImageRequest, LoadRequest
from deepseek_triton.loadtest.sample import Sample


class Streams(Protocol):
    """The methods of a client that a request needs."""

    def stream(self, request: GenerateRequest) -> Generator[Chunk, None, None]:
        """Yield the answer's chunks as they arrive."""
        ...

    def generate(self, request: GenerateRequest) -> Generation:
        """Wait for the whole answer."""
        ...


class Scores(Protocol):
    """The method of a client that a text to score needs."""

    def score(self, request: ScoreRequest) -> tuple[Score, ...]:
        """Score every text."""
        ...


class Reports(Protocol):
    """The method of a client that an image needs."""

    def stream_tensors(self, inputs: Any) -> Generator[Chunk, None, None]:
        """Yield the report's chunks as they arrive."""
        ...


@dataclass
class Recorder:
    """The samples of a run so far, and its clock: seconds since the end of the warm-up, negative before."""

    origin: float = field(default_factory=time.perf_counter)
    samples: list[Sample] = field(default_factory=list)
    num_begun: int = 0
    tokens: dict[int, int] = field(default_factory=dict)  # whole second → tokens that arrived in it

    def now(self) -> float:
        """Seconds since the warm-up's end."""
        return time.perf_counter() - self.origin

    def count_tokens(self, at_s: float, count: int) -> None:
        """Count tokens that arrived at `at_s`."""
        second = int(at_s // 1)
        self.tokens[second] = self.tokens.get(second, 0) + count


def exchange(
    client: Any, request: LoadRequest, protocol: ProtocolName, due_s: float, recorder: Recorder
) -> tuple[Sample, Generation | None]:
    """Send one request and wait for its end; the answer is None unless it is complete.

    client: a `Streams`, for a ScoreRequest a `Scores`, for an ImageRequest a `Reports`.
    """
    recorder.num_begun += 1
    sent_s = recorder.now()
    chunks: list[Chunk] = []
    first_s, end_s, max_gap_s, error = None, sent_s, 0.0, ""
    try:
        for chunk in _answer(client, request, protocol):
            now = recorder.now()
            recorder.count_tokens(now, chunk.num_output_tokens - (chunks[-1].num_output_tokens if chunks else 0))
            if first_s is None:
                first_s = now
            else:
                max_gap_s = max(max_gap_s, now - end_s)
            end_s = now
            chunks.append(chunk)
    except ClientError as failure:
        end_s = recorder.now()
        error = f"{type(failure).__name__}: {failure}"
    last = chunks[-1] if chunks else Chunk("", "", 0, 0)
    sample = Sample(
        protocol=protocol,
        due_s=due_s,
        sent_s=sent_s,
        first_s=first_s,
        end_s=end_s,
        num_input_tokens=last.num_input_tokens,
        num_output_tokens=last.num_output_tokens,
        num_first_tokens=chunks[0].num_output_tokens if chunks else 0,
        num_responses=len(chunks),
        max_gap_s=max_gap_s,
        finish_reason=last.finish_reason,
        error=error,
    )
    recorder.samples.append(sample)
    return sample, Generation.from_chunks(chunks) if sample.is_complete else None


def _answer(client: Any, request: LoadRequest, protocol: ProtocolName) -> Generator[Chunk, None, None]:
    if isinstance(request, ScoreRequest):
        scores = client.score(request)
        yield Chunk("", "stop", sum(score.num_input_tokens for score in scores), 0)
    elif isinstance(request, ImageRequest):
        with closing(client.stream_tensors(report_inputs(request.image))) as chunks:
            yield from chunks
    elif protocol.endswith("-stream"):
        with closing(client.stream(request)) as chunks:
            yield from chunks
    else:
        whole = client.generate(request)
        yield Chunk(whole.text, whole.finish_reason, whole.num_input_tokens, whole.num_output_tokens)
