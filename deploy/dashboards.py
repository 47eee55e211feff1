"""Grafana's dashboards as JSON, made of deploy/panels.py with Grafana's own library."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh

from deploy.panels import DASHBOARDS, DashboardSpec, PanelSpec

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")  # the viewer's choice
WIDTH, HEIGHT = 8, 8  # of a panel; the screen has 24 columns


def dashboards() -> dict[str, str]:
    """File name → JSON."""
    return {f"{spec.uid}.json": _dashboard(spec) for spec in DASHBOARDS}


def _dashboard(spec: DashboardSpec) -> str:
    made = (
        dashboard.Dashboard(spec.title)
        .uid(spec.uid)
        .tags(["deepseek-triton"])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    if spec.has_models:
        models = dashboard.QueryVariable("model").label("Model").datasource(SOURCE)
        models = models.query("label_values(deepseek_slots, model)").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        # nv_ metrics have the parts' own names, as NAME-engine: "all" means every name.
        made = made.with_variable(models.multi(True).include_all(True).all_value(".*"))
    for panel in spec.panels:
        made = made.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _panel(spec: PanelSpec) -> timeseries.Panel:
    panel = timeseries.Panel().title(spec.title).unit(spec.unit).datasource(SOURCE).min(0).span(WIDTH).height(HEIGHT)
    if spec.description:
        panel = panel.description(spec.description)
    for number, shown in enumerate(spec.shown):
        query = prometheus.Dataquery().expr(shown.query).legend_format(shown.legend).ref_id(chr(ord("A") + number))
        panel = panel.with_target(query)
    return panel
