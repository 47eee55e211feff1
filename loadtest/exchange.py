"""One request from its sending to its last response: a client in, a sample out.

It knows the clients' interface and a clock, nothing of Locust: the same code measures under gevent and in a plain
program. Errors of the server and the connection become part of the sample; any other exception is a bug and is raised.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

from deepseek_triton.clients.api import Chunk, GenerateRequest, Generation
from deepseek_triton.clients.errors import ClientError
from deepseek_triton.loadtest.profile import ProtocolName
from deepseek_triton.loadtest.sample import Sample


class Streams(Protocol):
    """What a request needs of a client."""

    def stream(self, request: GenerateRequest) -> Generator[Chunk, None, None]:
        """Give the answer as it comes."""
        ...

    def generate(self, request: GenerateRequest) -> Generation:
        """Wait for the whole answer."""
        ...


@dataclass
class Recorder:
    """What a run has seen so far. `now` is its clock: seconds since the warm-up's end, negative before."""

    origin: float = field(default_factory=time.perf_counter)
    samples: list[Sample] = field(default_factory=list)
    num_begun: int = 0
    tokens: dict[int, int] = field(default_factory=dict)  # whole second → tokens that came in it

    def now(self) -> float:
        """Seconds since the warm-up's end."""
        return time.perf_counter() - self.origin

    def count_tokens(self, at_s: float, count: int) -> None:
        """Note tokens that came."""
        second = int(at_s // 1)
        self.tokens[second] = self.tokens.get(second, 0) + count


def exchange(
    client: Streams, request: GenerateRequest, protocol: ProtocolName, due_s: float, recorder: Recorder
) -> tuple[Sample, Generation | None]:
    """Send one request and wait for its end; the answer is None unless it came whole."""
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


def _answer(client: Streams, request: GenerateRequest, protocol: ProtocolName) -> Generator[Chunk, None, None]:
    if protocol.endswith("-stream"):
        with closing(client.stream(request)) as chunks:
            yield from chunks
    else:
        whole = client.generate(request)
        yield Chunk(whole.text, whole.finish_reason, whole.num_input_tokens, whole.num_output_tokens)
