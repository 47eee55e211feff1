"""The gate: limits are read strictly, each one can fail a candidate, only its own passing report promotes one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.commands.gate import NOT_PASSED
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.digest import digest_of
from deepseek_triton.builders.lifecycle.gate.gate import verdicts
from deepseek_triton.builders.lifecycle.gate.limits import read_limits
from deepseek_triton.builders.lifecycle.gate.measure import GateFigures
from deepseek_triton.builders.lifecycle.gate.report import JUDGED, Report, require_passed
from tests.builders.lifecycle.test_learn import write_lines
from tests.support.checkpoints import make_checkpoint, make_tokenizer

LIMITS: dict[str, Any] = {"old_data": {"max_loss_increase": 0.1}, "new_data": {"min_loss_decrease": 0.2}}
ALL = {
    **LIMITS,
    "speed": {"min_ratio": 0.5},
    "memory": {"max_ratio": 1.5},
    "checks": [{"name": "polite", "prompt": "hi", "must_match": "please", "must_not_match": "damn"}],
}


def limits_file(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("{", "not valid JSON"),
        ([], "object"),
        ({}, "old_data is missing"),
        ({**LIMITS, "colour": {}}, "'colour'"),
        ({**LIMITS, "old_data": 5}, "old_data must be"),
        ({**LIMITS, "old_data": {"max": 1}}, "max_loss_increase"),
        ({**LIMITS, "old_data": {"max_loss_increase": True}}, "must be a number"),
        ('{"old_data": {"max_loss_increase": NaN}, "new_data": {"min_loss_decrease": 1}}', "must be a number"),
        ({**LIMITS, "speed": {"min_ratio": 0}}, "above 0"),
        ({**LIMITS, "checks": {}}, "a list"),
        ({**LIMITS, "checks": [{"prompt": "x"}]}, "with name"),
        ({**LIMITS, "checks": [{"name": "a", "prompt": "x"}]}, "checks nothing"),
        ({**LIMITS, "checks": [{"name": "a", "must_match": "x"}]}, "prompt or messages"),
        ({**LIMITS, "checks": [{"name": "a", "prompt": "x", "must_match": "("}]}, "no regular expression"),
        ({**LIMITS, "checks": [{"name": "a", "prompt": "x", "must_match": 5}]}, "no regular expression"),
        ({**LIMITS, "checks": [{"name": "a", "prompt": "x", "is_json": 1}]}, "is_json"),
        ({**LIMITS, "checks": [{"name": "a", "prompt": "x", "is_json": True, "max_tokens": 0}]}, "max_tokens"),
        ({**LIMITS, "checks": [{"name": "a", "messages": "x", "is_json": True}]}, "messages must be"),
        ({**LIMITS, "checks": [{"name": "a", "prompt": "x", "is_json": True}] * 2}, "names of their own"),
    ],
)
def test_limits_that_are_wrong_are_refused(values: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=reason):
        read_limits(limits_file(tmp_path / "limits.json", values))


GOOD = GateFigures({"old": 2.0, "new": 1.0}, {"polite": "yes please"}, 100)
BASE = GateFigures({"old": 2.0, "new": 3.0}, {"polite": "no"}, 100)


@pytest.mark.parametrize(
    ("change", "speeds", "failed"),
    [
        ({}, (10.0, 10.0), []),
        ({"losses": {"old": 2.2, "new": 1.0}}, (10.0, 10.0), ["old_data"]),
        ({"losses": {"old": 2.0, "new": 2.9}}, (10.0, 10.0), ["new_data"]),
        ({"losses": {"old": float("nan"), "new": float("nan")}}, (10.0, 10.0), ["old_data", "new_data"]),
        ({"answers": {"polite": "damn, please"}}, (10.0, 10.0), ["check polite"]),
        ({"answers": {"polite": ""}}, (10.0, 10.0), ["check polite"]),
        ({"weight_bytes": 151}, (10.0, 10.0), ["memory"]),
        ({}, (4.0, 10.0), ["speed"]),
    ],
)
def test_each_limit_fails_what_breaks_it(
    change: dict[str, Any], speeds: tuple[float, float], failed: list[str], tmp_path: Path
) -> None:
    limits = read_limits(limits_file(tmp_path / "limits.json", ALL))
    found = list(verdicts(limits, replace(GOOD, **change), BASE, speeds))
    assert [one.name for one in found if not one.passed] == failed and len(found) == 5
    report = Report({"name": "c", "sha256": "1"}, {"name": "<b>", "sha256": "2"}, tuple(found), {}, (), "", "")
    report.save(tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert JUDGED in page and f'"judged": "{JUDGED}"' in (tmp_path / "report" / "report.json").read_text("utf-8")
    assert "&lt;b&gt;" in page and "<b>" not in page and "http" not in page
    if failed:
        with pytest.raises(BuildError, match=failed[0]):
            require_passed(tmp_path / "report", "1")
    else:
        assert require_passed(tmp_path / "report", "1")["passed"] is True
        with pytest.raises(BuildError, match="run the gate on what is to be promoted"):
            require_passed(tmp_path / "report", "another")


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"format": 9}', '{"format": 1, "candidate": {"sha256": "1"}}']
)
def test_what_is_no_report_promotes_nothing(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(BuildError):
        require_passed(tmp_path, "1")


@pytest.mark.slow
def test_the_command_judges_two_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    base = make_tokenizer(make_checkpoint(tmp_path / "base"))
    candidate = make_tokenizer(make_checkpoint(tmp_path / "candidate", rms_norm_eps=1e-2))
    data = write_lines(tmp_path / "new.jsonl", [{"text": f"abc {index}"} for index in range(12)])
    replay = write_lines(tmp_path / "old.jsonl", [{"text": f"xyz {index}"} for index in range(12)])
    wide = {
        "old_data": {"max_loss_increase": 9}, "new_data": {"min_loss_decrease": -9}, "memory": {"max_ratio": 1},
        "checks": [{"name": "talks", "prompt": "ab", "must_match": "(?s).", "max_tokens": 4},
                   {"name": "chats", "messages": [{"role": "user", "content": "hi"}], "must_match": "(?s).",
                    "max_tokens": 4}],
    }  # fmt: skip
    command = ["gate", str(candidate), "--against", str(base), "--data", str(data), "--replay", str(replay)]
    command += ["--held-out", "0.5", "--device", "cpu", "--report", str(tmp_path / "report")]
    limits = limits_file(tmp_path / "limits.json", wide)
    assert cli.main([*command, "--limits", str(limits)]) == 0
    assert "the candidate passed" in capsys.readouterr().out
    report = require_passed(tmp_path / "report", digest_of(open_checkpoint(candidate)))
    assert report["not_checked"] == ["speed"] and report["data"]["new"]["examples"] > 0
    limits_file(limits, {**wide, "new_data": {"min_loss_decrease": 5}})
    assert cli.main([*command, "--limits", str(limits)]) == NOT_PASSED
    assert "FAILED  new_data" in capsys.readouterr().out
    with pytest.raises(BuildError, match="new_data"):
        require_passed(tmp_path / "report", digest_of(open_checkpoint(candidate)))
