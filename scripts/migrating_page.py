"""Write the table of docs/migrating.md that comes from the table of compatible options.

python scripts/migrating_page.py
"""

from __future__ import annotations

from pathlib import Path

from deepseek_triton.ensemble.protocol.compatible_options import COMPATIBLE_OPTIONS, CompatibleOption

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
BEGIN = "<!-- begin: scripts/migrating_page.py writes this -->"
END = "<!-- end -->"
HEAD = "| input | type | taken | meaning here |\n|---|---|---|---|"


def table() -> str:
    """A row for each input."""
    return "\n".join([HEAD, *map(_row, COMPATIBLE_OPTIONS)])


def updated(page: str) -> str:
    """The page with the table as it should be."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def _row(option: CompatibleOption) -> str:
    kind = option.dtype + (" [n]" if option.dims == (-1,) else "")
    values = " or ".join(str(value).lower() for value in option.neutral)
    taken = "any" if option.alias_of else values or ("an empty text" if option.dtype == "STRING" else "none")
    meaning = " ".join(filter(None, (option.meaning, option.note)))
    return f"| `{option.tensor_name}` | {kind} | {taken} | {meaning} |"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
