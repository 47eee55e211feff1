"""`make example-fraud` as a whole, with a tiny random language model and few payments."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.examples.fraud import __main__ as command
from deepseek_triton.examples.fraud.__main__ import OURS, SETS, main
from deepseek_triton.examples.fraud.evaluation import evaluate
from deepseek_triton.examples.fraud.training import TREES
from deepseek_triton.loadtest import profile
from tests.support.checkpoints import make_tokenizer, write_tiny

ROOT = Path(__file__).parents[3]


@pytest.mark.server
@pytest.mark.slow
def test_it_trains_serves_decides_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TREES, "n_estimators", 10)
    monkeypatch.setattr(command, "evaluate", partial(evaluate, num_resamples=20))
    changes: dict[str, Any] = {"vocab_size": 320, "eos_token_id": 319, "max_position_embeddings": 512}
    checkpoint = make_tokenizer(write_tiny(tmp_path / "tiny", **changes))
    words = ["--checkpoint", str(checkpoint), "--repository", str(tmp_path / "build" / "models"), "--precision", "fp32"]
    status = main([*words, "--layers", "1", "--train", "200", "--test", "100", "--result", str(tmp_path / "fraud")])
    told = capsys.readouterr()
    assert status == 0, told.err
    assert told.out.count("(truth: ") == 6, "decisions with their reasons"
    result = json.loads((tmp_path / "fraud.json").read_text(encoding="utf-8"))
    assert set(result["sets"]) == set(SETS)
    for found in result["sets"].values():
        assert len(found["figures"]) == 5 and OURS in found["figures"]
        for own in found["figures"].values():
            assert all(0 <= each["low"] <= each["high"] <= 1 for each in own.values())
    assert OURS in (tmp_path / "fraud.md").read_text(encoding="utf-8")
    # The load profile reads the payments that were written.
    own = tmp_path / "load.toml"
    text = (ROOT / "examples" / "fraud" / "load.toml").read_text(encoding="utf-8")
    own.write_text(text.replace("../../build/fraud/payments.txt", "build/payments.txt"), encoding="utf-8")
    assert profile.load(str(own)).requests.texts == str(tmp_path / "build" / "payments.txt")


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "no"), "--repository", str(tmp_path / "models")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
