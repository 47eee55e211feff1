"""Measurements made by hand, and small models to tune."""

from __future__ import annotations

from pathlib import Path

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions
from deepseek_triton.builders.tune.measurement import Measurement
from deepseek_triton.builders.tune.repository import read_configs
from deepseek_triton.builders.tune.space import read_point, space_of
from tests.support.checkpoints import make_tokenizer, write_tiny

SECONDS = 10.0


def found(throughput: float, p99_ms: float = 10.0, failure: str = "") -> Measurement:
    """So many requests/s, 2 in 100 of them as slow as `p99_ms`, the others half as slow."""
    if failure:
        return Measurement(failure=failure)
    count = max(round(throughput * SECONDS), 1)
    slow = -(-count // 50)
    return Measurement((p99_ms / 2,) * (count - slow) + (p99_ms,) * slow, SECONDS)


def tiny_checkpoint(directory: Path) -> Path:
    return make_tokenizer(write_tiny(directory / "tiny", vocab_size=320, eos_token_id=319))


def tiny_repository(directory: Path) -> Path:
    """A scoring model, "s", and a generator, "g"."""
    checkpoint, models = tiny_checkpoint(directory), directory / "models"
    scoring = ScoringOptions(labels=("a", "b"), batching=Batching(max_batch_size=8, preferred_batch_sizes=(4,)))
    build(BuildOptions(checkpoint, "s", models, task="score", max_seq_len=32, scoring=scoring))
    settings = {"max_num_seqs": 3, "max_num_batched_tokens": 8}
    build(BuildOptions(checkpoint, "g", models, max_seq_len=32, settings=settings))
    return models


def point_of(repository: Path) -> dict[str, int]:
    configs = read_configs(repository, "s")
    return read_point(space_of(configs, "s", {}), configs, "s")
