"""Write the table of docs/gateway.md that comes from the gateway's table of settings.

python -m scripts.gateway_page
"""

from __future__ import annotations

from pathlib import Path

from deepseek_triton.gateway.settings import SETTINGS, SettingRow

PAGE = Path(__file__).parents[1] / "docs" / "gateway.md"
BEGIN = "<!-- begin: scripts/gateway_page.py writes this -->"
END = "<!-- end -->"


def table() -> str:
    """A row for each setting."""
    head = "| option | environment variable | default | meaning |\n|---|---|---|---|\n"
    return head + "".join(
        f"| `{row.option}` | `{row.variable}` | {_default(row)} | {row.meaning} |\n" for row in SETTINGS
    )


def updated(page: str) -> str:
    """The page with the table as it should be."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def _default(row: SettingRow) -> str:
    if isinstance(row.default, bool):
        return "on" if row.default else "off"
    if isinstance(row.default, tuple):
        return ", ".join(f"`{value}`" for value in row.default) or "none"
    return f"`{row.default}`" if row.default != "" else "none"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
