"""`python -m deploy.generate`: write Prometheus' files and Grafana's dashboards from the tables here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepseek_triton.command_parser import CommandParser
from deploy import files
from deploy.dashboards import dashboards
from deploy.recording import LIMITS

FOLDER = Path(__file__).parent


def generated(limits: Mapping[str, float] | None = None, runbooks: str = "") -> dict[str, str]:
    """Path below deploy/ → text; `limits`, `runbooks`: as of `files.rules`; the chart has its own values."""
    return {
        "prometheus/prometheus.yaml": files.to_yaml(files.scrape_configuration()),
        "prometheus/rules.yaml": files.to_yaml(files.rules(limits, runbooks)),
        "chart/files/rules.yaml": files.to_yaml(files.rules(limits)),
        "prometheus/rules_test.yaml": files.to_yaml(files.rule_tests()),
        **{f"grafana/dashboards/{name}": text for name, text in dashboards().items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write every file."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder to write to (default: deploy/)")
    shown = ", ".join(f"{limit.name} ({limit.value:g}): {limit.meaning}" for limit in LIMITS.values())
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE", help=f"one of {shown}")
    where = "an address that ends with /, which stands before docs/operations.md#… in alerts' annotations"
    parser.add_argument("--runbooks", default="", metavar="URL", help=where)
    arguments = parser.parse_args(argv)
    try:
        limits = {name: float(value) for name, _, value in (text.partition("=") for text in arguments.limit)}
        texts = generated(limits, arguments.runbooks)
    except (KeyError, ValueError) as error:
        parser.error(f"--limit takes NAME=VALUE with a name of {', '.join(LIMITS)}: {error}")
    for name, text in texts.items():
        path = arguments.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
