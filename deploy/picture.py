"""`python -m deploy.picture`: the panels' data, asked of a real Prometheus, as one picture.

It shows what the dashboards' queries give; Grafana draws them in its own way.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deepseek_triton.command_parser import CommandParser
from deploy.panels import DASHBOARDS, DashboardSpec
from deploy.prometheus_api import Line, Prometheus

COLUMNS = 4


def draw(
    prometheus: Prometheus, seconds: float, step_s: float, path: Path, dashboards: Sequence[DashboardSpec] = DASHBOARDS
) -> None:
    """Draw every panel's lines over the last `seconds`, which are the axis below."""
    from matplotlib.figure import Figure

    end = time.time()
    panels = [panel for dashboard in dashboards for panel in dashboard.panels]
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.6 * rows))
    figure.subplots_adjust(0.04, 0.02, 0.99, 0.98, wspace=0.2, hspace=0.35)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        axes.set_title(f"{panel.title} ({panel.unit})", fontsize=9)
        for shown in panel.shown:
            for line in prometheus.lines(shown.query, seconds, step_s):
                points = [(at, value) for at, value in line.points if math.isfinite(value)]
                if points:
                    style = "--" if shown.legend == "limit" else "-"
                    axes.plot([at - end for at, _ in points], [value for _, value in points], style,
                              label=_legend(shown.legend, line), linewidth=1)  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlim(-seconds, 0)
        axes.tick_params(labelsize=7)
        if axes.lines:  # a ratio whose parts are all 0 has no line
            axes.legend(fontsize=5, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _legend(template: str, line: Line) -> str:
    """The line's name; one without labels, as `or vector(0)` gives before anything was counted, has that of all."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: line.labels.get(match[1], ""), template).strip() or "all"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the Prometheus at --url has."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:9090")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--step", type=float, default=15, help="seconds between points")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args(argv)
    draw(Prometheus(arguments.url), arguments.seconds, arguments.step, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
