"""Random configurations of every architecture: written by transformers, built, and compared with it in the logits.

`pytest tests/builders/graph/test_random_checkpoints.py --checkpoint-examples 2000` runs as many, and
`--checkpoint-first-seed` says where it begins. A failure names its seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from tests.support.checkpoints import load_reference, make_tokenizer
from tests.support.random_checkpoints import Drawn, draw, draw_latent, write

torch = pytest.importorskip("torch")

TOLERANCE = 2e-3  # of the largest logit: float32 on both sides, the sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("draw", [draw, draw_latent], ids=["dense", "latent"])
def test_random_checkpoints_give_the_logits_of_transformers(
    draw: Callable[[int], Drawn], tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    count = int(pytestconfig.getoption("--checkpoint-examples"))
    first = int(pytestconfig.getoption("--checkpoint-first-seed"))
    for seed in range(first, first + count):
        drawn = draw(seed)
        try:
            difference = largest_difference(drawn, tmp_path / "example", seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}; {drawn}") from error
        assert difference <= TOLERANCE, f"seed {seed}: logits differ by {difference:.1%}; {drawn}"
        shutil.rmtree(tmp_path / "example")
        if count > 100 and seed % 100 == 99:
            with capsys.disabled():
                print(f"\n{seed + 1 - first} random checkpoints agree", end="", flush=True)


def largest_difference(drawn: Drawn, directory: Path, seed: int) -> float:
    """The largest difference of a logit over the largest logit, of prompts computed at once and in two chunks."""
    checkpoint = make_tokenizer(write(drawn, directory / "checkpoint", seed), drawn.config["vocab_size"])
    repository = directory / "repository"
    notes: list[str] = []
    build(BuildOptions(checkpoint, "m", repository), say=notes.append)
    assert not [note for note in notes if note.startswith("warning")], notes
    manifest = Manifest.load(repository / "m-engine/1")
    assert manifest.max_seq_len >= max(drawn.lengths)
    reference = load_reference(checkpoint)
    runner = OnnxRunner(repository / "m-engine/1/model.onnx", max_num_seqs=1, num_threads=1)
    ids = np.random.default_rng(seed).integers(0, drawn.config["vocab_size"], max(drawn.lengths))
    differences = [0.0]
    for length in drawn.lengths:
        with torch.no_grad():
            expected = reference(torch.tensor(ids[:length])[None]).logits[0, -1].numpy()
        scale = max(1.0, float(np.abs(expected).max()))
        assert np.isfinite(expected).all()
        for logits in whole_and_in_chunks(runner, ids[:length]):
            differences.append(float(np.abs(logits - expected).max()) / scale)
    runner.close()
    return max(differences)


def whole_and_in_chunks(runner: OnnxRunner, ids: np.ndarray[Any, np.dtype[np.int64]]) -> list[Any]:
    whole = runner.prefill(0, ids, 0).copy()
    cut = len(ids) // 2
    runner.prefill(0, ids[:cut], 0)
    return [whole, runner.prefill(0, ids[cut:], cut).copy()]
