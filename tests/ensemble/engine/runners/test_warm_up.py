"""A runner's slow first steps are taken at load, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.engine.runners.onnx import runner as onnx
from deepseek_triton.ensemble.engine.runners.warm_up import NUM_TOKENS, warm_up
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from tests.support.tuning import tiny_checkpoint


class CountingRunner:
    """Records the shapes of the steps."""

    max_num_seqs, vocab_size = 5, 7

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self.steps: list[tuple[str, int, int]] = []

    def prefill(self, slot: int, ids: Any, start: int) -> Any:
        self.steps.append(("prefill", len(ids), start))

    def decode(self, ids: Any, positions: Any) -> Any:
        assert len(ids) == len(positions)
        self.steps.append(("decode", len(ids), int(positions.max())))


@pytest.mark.parametrize(
    ("max_seq_len", "max_num_batched_tokens", "num_tokens"), [(64, 64, NUM_TOKENS), (64, 3, 3), (4, 64, 3), (2, 1, 1)]
)
def test_the_steps_fit_the_runner(max_seq_len: int, max_num_batched_tokens: int, num_tokens: int) -> None:
    runner: Any = CountingRunner(max_seq_len)
    warm_up(runner, max_num_batched_tokens, [1, 4])
    assert runner.steps == [("prefill", num_tokens, 0), ("decode", 1, num_tokens), ("decode", 4, num_tokens)]
    assert num_tokens < max_seq_len


def test_an_engine_is_warm_when_it_is_loaded_and_answers_as_a_cold_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    build(BuildOptions(tiny_checkpoint(tmp_path), "m", models, max_seq_len=32))
    settings = EngineSettings(max_num_seqs=2, max_num_batched_tokens=8, num_threads=1)
    warmed: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "warm_up", lambda runner, tokens: warmed.append(runner))
        _, cold = load_runner(models / "m-engine" / "1", settings)
    assert warmed == [cold]
    _, warm = load_runner(models / "m-engine" / "1", settings)
    ids = np.arange(5)
    for slot in range(2):
        np.testing.assert_array_equal(warm.prefill(slot, ids, 0).copy(), cold.prefill(slot, ids, 0))
    positions = np.array([5, 5])
    np.testing.assert_array_equal(warm.decode(ids[:2], positions).copy(), cold.decode(ids[:2], positions))
