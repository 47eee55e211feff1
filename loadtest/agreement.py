"""Compares the client's measurements with the engine's metrics of the same requests.

The client's time to first token includes the engine's. The difference, less the time in Triton's other models, is
spent in the network and the load generator, and must stay below TOLERANCE. Means are compared, since percentiles of
histogram buckets are too coarse. The means cover the same requests only if every answer is streamed; otherwise only
the number of tokens is compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_triton.loadtest.engine import EngineWork
from deepseek_triton.loadtest.metrics import ModelWork, mean
from deepseek_triton.loadtest.sample import Sample
from deepseek_triton.loadtest.validity import TOLERANCE
from deepseek_triton.loadtest.verdict import Verdict


def check(samples: Sequence[Sample], engine: EngineWork | None, others: dict[str, ModelWork]) -> list[Verdict]:
    """Return the verdicts; none if the engine publishes no metrics or a request has no complete answer.

    Args:
        samples: all samples, including the warm-up.
        engine: the engine's work from before the first request to after the last answer.
        others: the work of the ensemble's other models in the same time.
    """
    if engine is None or not samples or not all(sample.is_complete for sample in samples):
        return []
    received = sum(sample.num_output_tokens for sample in samples)
    verdicts = [
        Verdict(
            "tokens, generated less received",
            abs(engine.tokens - received),
            0,
            "tokens",
            "client and engine counted different tokens: answers lost some, or one of the two counts wrongly",
        )
    ]
    if all(sample.is_streamed for sample in samples):
        verdicts += _check_first_token(samples, engine, others) + _check_inter_token(samples, engine)
    return verdicts


def _check_first_token(samples: Sequence[Sample], engine: EngineWork, others: dict[str, ModelWork]) -> list[Verdict]:
    client = mean(sample.first_s - sample.sent_s for sample in samples if sample.first_s is not None)
    server = engine.first_token_s.mean
    if client is None or server is None:
        return []
    # Before a stream's first response each of the other models runs once: the tokenizer and the detokenizer.
    around = sum(((model.queue_ms or 0.0) + (model.compute_ms or 0.0)) / 1e3 for model in others.values())
    return [
        Verdict(
            "time to first token, the server's mean less the client's",
            server - client,
            0,
            "s",
            "the client can't have seen tokens before they were made: one of the two clocks is wrong",
        ),
        Verdict(
            "time to first token, the client's mean less the server's",
            client - server - around,
            TOLERANCE * client,
            "s",
            "more than a tenth of it is spent outside the server's models: on the way, or in the generator",
        ),
    ]


def _check_inter_token(samples: Sequence[Sample], engine: EngineWork) -> list[Verdict]:
    server = engine.inter_token_s.mean
    streams = [(sample.end_s - sample.first_s, sample.num_output_tokens - sample.num_first_tokens)
               for sample in samples if sample.first_s is not None]  # fmt: skip
    tokens = sum(count for _, count in streams)
    if server is None or not tokens:
        return []
    client = sum(seconds for seconds, _ in streams) / tokens
    return [
        Verdict(
            "inter-token latency, client's mean against the server's",
            abs(client - server),
            TOLERANCE * client,
            "s",
            "client and engine differ by more than a tenth on how fast tokens follow each other",
        )
    ]
