"""Write the table of docs/settings.md that comes from the table of settings.

python scripts/settings_page.py
"""

from __future__ import annotations

from pathlib import Path

from deepseek_triton.builders.repository.setting_options import settings_table

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
BEGIN = "<!-- begin: scripts/settings_page.py writes this -->"
END = "<!-- end -->"


def updated(page: str) -> str:
    """The page with the table as it should be."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{settings_table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
