"""The CPU runner's results are bit-identical with and without reuse, in any chunks and any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from tests.conftest import NAME

IDS = np.random.default_rng(0).integers(1000, 40000, 131)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runner(smollm2_repository: Path) -> OnnxRunner:
    return OnnxRunner(smollm2_repository / f"{NAME}-engine" / "1" / "model.onnx", max_num_seqs=4)


def prefill(runner: OnnxRunner, slot: int, ids: Any, cuts: tuple[int, ...] = ()) -> Any:
    for start, end in zip((0, *cuts), (*cuts, len(ids)), strict=True):
        logits = runner.prefill(slot, ids[start:end], start)
    return logits.copy()


@pytest.mark.parametrize("cuts", [(130,), (1,), (1, 2, 3, 4), (17, 34, 100), (63, 64, 65, 66, 129)])
def test_a_prompt_gives_the_same_bits_however_it_is_cut(runner: OnnxRunner, cuts: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(prefill(runner, 1, IDS, cuts), prefill(runner, 0, IDS, (64, 128)))


@pytest.mark.parametrize("num_reused", [16, 100, 130])
def test_a_copied_prefix_gives_the_same_bits(runner: OnnxRunner, num_reused: int) -> None:
    whole = prefill(runner, 0, IDS)
    runner.copy_prefix(0, 2, num_reused)
    np.testing.assert_array_equal(runner.prefill(2, IDS[num_reused:], num_reused), whole)
    # and so does what is generated from there
    token, position = np.array([7]), np.array([len(IDS)])
    alone = runner.decode(token, position).copy()
    rows = runner.decode(np.array([5, 5, 7]), np.array([len(IDS)] * 3))
    np.testing.assert_array_equal(rows[2], alone[0])
