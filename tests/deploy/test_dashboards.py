"""Dashboards: every query of every panel has data, from a real Prometheus and a real tritonserver under load."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from deploy.dashboards import dashboards
from deploy.metrics import SERIES, names_in
from deploy.panels import DASHBOARDS, PanelSpec, Shown
from deploy.picture import draw
from deploy.prometheus_api import Prometheus
from deploy.recording import LIMITS, RULES

QUERIES = [(panel, shown) for dashboard in DASHBOARDS for panel in dashboard.panels for shown in panel.shown]


@pytest.mark.parametrize(("panel", "shown"), QUERIES, ids=[f"{panel.title}-{shown.legend}" for panel, shown in QUERIES])
def test_a_query_has_names_of_the_list_alone(panel: PanelSpec, shown: Shown) -> None:
    assert names_in(shown.query) <= set(SERIES)
    recorded = set(RULES) | {limit.recorded for limit in LIMITS.values()}
    assert set(re.findall(r"\b\w+:[\w:]+", shown.query)) <= recorded


def test_every_metric_of_an_engine_is_shown_or_is_part_of_what_is() -> None:
    used = {name for _, shown in QUERIES for name in names_in(shown.query)}
    used |= {name for query in RULES.values() for name in names_in(query)}
    families = {SERIES[name].name for name in used}
    assert {metric.name for metric in SERIES.values() if metric.source in ("engine", "gateway", "gpu")} <= families


@pytest.mark.parametrize("text", dashboards().values(), ids=dashboards())
def test_a_dashboard_is_whole(text: str) -> None:
    made: dict[str, Any] = json.loads(text)
    spec = next(spec for spec in DASHBOARDS if spec.uid == made["uid"])
    assert [panel["title"] for panel in made["panels"]] == [panel.title for panel in spec.panels]
    for panel, shown in zip(made["panels"], spec.panels, strict=True):
        assert [target["expr"] for target in panel["targets"]] == [one.query for one in shown.shown]
        assert len({target["refId"] for target in panel["targets"]}) == len(shown.shown)
        assert panel["datasource"]["uid"] == "${datasource}"
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in made["panels"]]
    assert len(set(places)) == len(places), "no panel lies on another"


@pytest.mark.server
def test_every_query_of_every_panel_has_data(watched: Prometheus) -> None:
    empty = []
    for panel, shown in QUERIES:
        lines = watched.lines(shown.query, 10, 1)
        if not any(math.isfinite(value) for line in lines for _, value in line.points):
            empty.append((panel.title, shown.query))
    assert empty == []


@pytest.mark.server
def test_the_panels_data_make_a_picture(watched: Prometheus, tmp_path: Path) -> None:
    draw(watched, 10, 1, tmp_path / "panels.png", DASHBOARDS[:1])  # each panel takes some time to draw
    assert (tmp_path / "panels.png").read_bytes().startswith(b"\x89PNG")
