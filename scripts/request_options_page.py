"""Write the tables of docs/requests.md that come from the table of request options.

python scripts/request_options_page.py
"""

from __future__ import annotations

from pathlib import Path

from deepseek_triton.ensemble.protocol.request_options import GROUPS, REQUEST_OPTIONS, RequestOption

PAGE = Path(__file__).parents[1] / "docs" / "requests.md"
BEGIN = "<!-- begin: scripts/request_options_page.py writes this -->"
END = "<!-- end -->"
HEAD = "| input | type | range | default | meaning |"


def tables() -> str:
    """A heading and a table for each group."""
    parts = []
    for group, title in GROUPS.items():
        rows = [_row(option) for option in REQUEST_OPTIONS if option.group == group]
        parts.append("\n".join([f"### {title}", "", HEAD, "|---|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def updated(page: str) -> str:
    """The page with the tables as they should be."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _row(option: RequestOption) -> str:
    kind = option.dtype + (" [n]" if option.is_list else "")
    allowed = "" if option.range is None else option.range.rule
    names = []
    if option.field != option.tensor_name:
        names.append(f"`{option.field}` in `GenerateRequest`")
    if option.flag:
        names.append(f"`{option.flag}` on the command line")
    meaning = f"{option.meaning} {' and '.join(names)}." if names else option.meaning
    return f"| `{option.tensor_name}` | {kind} | {allowed} | {_default(option)} | {meaning} |"


def _default(option: RequestOption) -> str:
    if option.default_note:
        return option.default_note
    if isinstance(option.default, bool):
        return str(option.default).lower()
    return "none" if option.default == () else f"{option.default:g}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
