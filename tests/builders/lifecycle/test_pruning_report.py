"""The report of a pruning: what it says of the parent itself and of worse models, its files, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.pruning.options import PruneOptions
from deepseek_triton.builders.lifecycle.pruning.prune import prune
from deepseek_triton.builders.lifecycle.pruning.report import measure
from tests.support.checkpoints import make_checkpoint, make_tokenizer

pytest.importorskip("torch")


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return make_tokenizer(make_checkpoint(tmp_path / "parent"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_text("".join(map(chr, np.random.default_rng(0).integers(33, 126, 300))), encoding="utf-8")
    return path


@pytest.mark.slow
def test_the_parent_keeps_all_and_less_is_worse(parent: Path, text: Path, tmp_path: Path) -> None:
    candidates = {"all of it": parent}
    for ratio in (0.1, 0.6):
        output = tmp_path / f"pruned-{ratio}"
        prune(PruneOptions(parent, output, ratio=ratio, method="l1", multiple_of=1))
        candidates[f"{100 * ratio:g} % l1"] = output
    report = measure(parent, candidates, text, num_tokens=200, window_len=64)
    same, little, much = report.rows
    assert (same.removed, same.quality.agreement, same.quality.perplexity_ratio) == (0, 1, 1)
    assert same.quality.mean_kl < 1e-9
    assert 0 < little.removed < much.removed
    assert 0 < little.quality.mean_kl < much.quality.mean_kl
    assert (
        same.num_bytes > little.num_bytes > much.num_bytes == (tmp_path / "pruned-0.6/model.safetensors").stat().st_size
    )
    assert all(row.tokens_per_s is not None and row.tokens_per_s > 0 for row in report.rows)
    report.save(tmp_path / "report")
    assert json.loads((tmp_path / "report/pruning.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    table = (tmp_path / "report/pruning.md").read_text()
    assert "| 10 % l1 |" in table and "200 tokens predicted" in table
    assert (tmp_path / "report/pruning.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_command_prints_the_table(
    parent: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", str(parent), "--method", "l1", "--output", str(tmp_path / "out"), "--multiple-of", "1", "-q"]
    assert cli.main([*words, "--evaluate", str(text), "--tokens", "100", "--report", str(tmp_path / "report")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("| | parameters removed |") and lines[-1].startswith("| 20 % l1 |")
    assert (tmp_path / "report/pruning.md").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--evaluate", "missing.txt"], "missing.txt: No such file"),
        (["--report", "report"], "--report needs --evaluate"),
    ],
)
def test_wrong_input_is_told_before_anything_is_pruned(
    more: list[str], message: str, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prune", str(parent), "--method", "l1", "--output", str(tmp_path / "out"), *more]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_model_is_no_candidate(parent: Path, text: Path, tmp_path: Path) -> None:
    other = make_tokenizer(make_checkpoint(tmp_path / "other", vocab_size=288, eos_token_id=287), 288)
    with pytest.raises(BuildError, match="has 288 tokens, its parent 320"):
        measure(parent, {"other": other}, text, num_tokens=100, is_timed=False)
