"""The generated files as text: Prometheus' configuration, rules and the rules' tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from deploy.alerts import ALERTS, Alert
from deploy.metrics import GATEWAY_JOB, JOB
from deploy.recording import LIMITS, RULES

NOTE = "# `python -m deploy.generate` writes this file.\n"
# The gateway asks for a key; deploy/compose.yaml puts Prometheus' own there.
METRICS_KEY = "/run/secrets/metrics_key"
STEP = "30s"
TEST_STEP = "1m"


def to_yaml(value: Any) -> str:
    """YAML with a note about where it is from; keys in their order."""
    text: str = yaml.safe_dump(value, sort_keys=False, width=118, allow_unicode=True)
    return NOTE + text


def rules(limits: Mapping[str, float] | None = None, runbooks: str = "") -> dict[str, Any]:
    """Limits, recording rules and alerts; `limits`: values in place of those of LIMITS. runbooks: before their paths.

    Raises:
        KeyError: a name that LIMITS doesn't have.
    """
    changed = {LIMITS[name].recorded: value for name, value in (limits or {}).items()}
    values = {limit.recorded: limit.value for limit in LIMITS.values()} | changed
    return {
        "groups": [
            {
                "name": "deepseek limits",
                "rules": [{"record": name, "expr": f"vector({value:g})"} for name, value in values.items()],
            },
            {
                "name": "deepseek recorded",
                "interval": STEP,
                "rules": [{"record": name, "expr": query} for name, query in RULES.items()],
            },
            {"name": "deepseek alerts", "interval": STEP, "rules": [_alert(alert, runbooks) for alert in ALERTS]},
        ]
    }


def _alert(alert: Alert, runbooks: str) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.query,
        "for": alert.wait,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "runbook_url": runbooks + alert.runbook},
    }


def rule_tests() -> dict[str, Any]:
    """promtool's tests: each alert fires with its series, and stays quiet with the others."""
    return {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": TEST_STEP,
        "tests": [case for alert in ALERTS for case in (_case(alert, True), _case(alert, False))],
    }


def _case(alert: Alert, fires: bool) -> dict[str, Any]:
    series = alert.fires if fires else alert.quiet
    # Its value and so its summary are the series' affair; alertname and labels are what is compared.
    firing = f'ALERTS{{alertname="{alert.name}", alertstate="firing"}}'
    query = f"count by (alertname, severity, {', '.join(alert.labels)}) ({firing})"
    labels = ", ".join(f'{name}="{value}"' for name, value in sorted(alert.labels.items()))
    expected = f'{{alertname="{alert.name}", {labels}, severity="{alert.severity}"}}'
    return {
        "name": f"{alert.name} {'fires' if fires else 'keeps quiet'}",
        "interval": TEST_STEP,
        "input_series": [
            {"series": name, "values": values.replace("xALL", f"x{alert.at.rstrip('m')}")}
            for name, values in series.items()
        ],
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": alert.at,
                "exp_samples": [{"labels": expected, "value": 1}] if fires else [],
            }
        ],
    }


def scrape_configuration() -> dict[str, Any]:
    """Prometheus on one machine, beside the containers of deploy/compose.yaml."""
    return {
        "global": {"scrape_interval": "15s", "evaluation_interval": STEP},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {"job_name": JOB, "static_configs": [{"targets": ["triton:8002"]}]},
            {
                "job_name": GATEWAY_JOB,
                "authorization": {"credentials_file": METRICS_KEY},
                "static_configs": [{"targets": ["gateway:9000"]}],
            },
        ],
    }
