"""Prometheus' files: as generated, sound to promtool, and every alert's two tests seen to fail without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deepseek_triton.ensemble.engine.metrics import descriptions
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deploy import files
from deploy.alerts import ALERTS
from deploy.generate import FOLDER, generated, main
from deploy.metrics import METRICS, SERIES, names_in
from deploy.recording import LIMITS, RULES

ROOT = Path(__file__).parents[2]


def promtool(*words: str, folder: Path = FOLDER / "prometheus") -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool: apt-get install prometheus")
    less_collecting = {**os.environ, "GOGC": "400"}  # of garbage, which takes a third of its time
    return subprocess.run(
        [program, *words], cwd=folder, env=less_collecting, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", generated())
def test_a_generated_file_is_what_its_table_gives(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == generated()[name], "run python -m deploy.generate"


def test_promtool_finds_everything_sound() -> None:
    for words in (("check", "config", "--syntax-only", "prometheus.yaml"), ("check", "rules", "rules.yaml")):
        done = promtool(*words)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_alert_fires_and_keeps_quiet() -> None:
    done = promtool("test", "rules", "rules_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [case["name"] for case in files.rule_tests()["tests"]]
    assert names == [f"{alert.name} {what}" for alert in ALERTS for what in ("fires", "keeps quiet")]


@pytest.mark.slow
@pytest.mark.parametrize(("query", "shown"), [("vector(1) < 0", "got: nil"), ("ALWAYS", "exp: nil")])
def test_the_tests_see_an_alert_that_is_wrong(tmp_path: Path, query: str, shown: str) -> None:
    """Without its condition an alert never fires, or always does: its test says so."""
    changed: dict[str, Any] = files.rules()
    for group in changed["groups"]:
        group["interval"] = files.TEST_STEP  # nothing changes between the samples
    for rule, alert in zip(changed["groups"][-1]["rules"], ALERTS, strict=True):
        always = "vector(1)"
        for name, value in alert.labels.items():
            always = f'label_replace({always}, "{name}", "{value}", "", "")'
        rule["expr"] = always if query == "ALWAYS" else query
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    cases = files.rule_tests()
    cases["tests"] = cases["tests"][1 if query == "ALWAYS" else 0 :: 2]
    for case in cases["tests"]:  # some look at hours; the longest that is pending is so for thirty minutes
        (expected,) = case["promql_expr_test"]
        expected["eval_time"] = f"{min(int(expected['eval_time'].rstrip('m')), 31)}m"
    (tmp_path / "rules_test.yaml").write_text(files.to_yaml(cases), encoding="utf-8")
    done = promtool("test", "rules", "rules_test.yaml", folder=tmp_path)
    failed = re.findall(r'alertname=\\?"(\w+)[^\n]+\n\s+exp: ?([^\n]*)\n\s+got: ?([^\n]*)', done.stdout + done.stderr)
    kind = [name for name, expected, got in failed if f"exp: {expected}" == shown or f"got: {got}" == shown]
    assert kind == [alert.name for alert in ALERTS]


def test_every_name_in_a_rule_is_in_the_list() -> None:
    for query in (
        *RULES.values(),
        *(alert.query for alert in ALERTS),
        *(s for a in ALERTS for s in (*a.fires, *a.quiet)),
    ):
        assert names_in(query) <= set(SERIES), query
    recorded = set(RULES) | {limit.recorded for limit in LIMITS.values()}
    for query in (alert.query for alert in ALERTS):
        assert set(re.findall(r"\b\w+:[\w:]+", query)) <= recorded, query


def test_the_list_has_every_metric_of_an_engine() -> None:
    assert {f"deepseek_{name}" for name in descriptions()} == {m.name for m in METRICS if m.source == "engine"}


def test_every_alert_has_its_paragraph() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    paragraphs = dict(re.findall(r"^### (\w+)\n\n(.+?)(?=\n#|\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(paragraphs) == [alert.name for alert in ALERTS]
    assert all(len(text.split()) > 20 for text in paragraphs.values())
    assert all(alert.runbook == f"docs/operations.md#{alert.name.lower()}" for alert in ALERTS)
    pages = {alert.name for alert in ALERTS if alert.severity == "page"}
    assert {name for name, text in paragraphs.items() if "(page" in text} == pages


def test_a_limit_can_be_set(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path), "--limit", "backlog=25"]) == 0
    text = (tmp_path / "prometheus" / "rules.yaml").read_text(encoding="utf-8")
    assert "record: deepseek:limit:backlog\n    expr: vector(25)" in text
    for wrong in ("backlogs=1", "backlog=many", "backlog"):
        with pytest.raises(SystemExit):
            main(["--output", str(tmp_path), "--limit", wrong])


def test_runbooks_get_an_address(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path), "--runbooks", "https://docs.example/"]) == 0
    groups = yaml.safe_load((tmp_path / "prometheus" / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    found = [rule["annotations"]["runbook_url"] for rule in groups[-1]["rules"]]
    assert found == [f"https://docs.example/{alert.runbook}" for alert in ALERTS]


@pytest.mark.server
def test_a_real_server_has_every_metric_of_the_list(tiny_server: TritonServer) -> None:
    text = httpx.get(tiny_server.metrics_url, timeout=30).text
    found = {family.name for family in text_string_to_metric_families(text)}
    found |= {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    wanted = {series for series, metric in SERIES.items() if metric.source in ("engine", "triton")}
    assert wanted - found == set()
