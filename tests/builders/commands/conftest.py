"""A tiny checkpoint, a repository built of it, and the signal handlers put back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_triton.builders.repository import build as repository
from deepseek_triton.builders.repository.options import BuildOptions
from tests.support.checkpoints import make_tokenizer, write_tiny


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """`serve` takes over the process's signals; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_tokenizer(write_tiny(tmp_path / "tiny", vocab_size=320, eos_token_id=319))


@pytest.fixture
def built(checkpoint: Path, tmp_path: Path) -> Path:
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 8}
    repository.build(BuildOptions(checkpoint, "m", tmp_path / "models", max_seq_len=32, settings=settings))
    return tmp_path / "models"
