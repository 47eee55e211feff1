"""docs/migrating.md: its table of inputs is the code's, and each line of what differs names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

from scripts import migrating_page

ROOT = Path(__file__).parents[2]
PAGE = migrating_page.PAGE.read_text(encoding="utf-8")
FORMS = (ROOT / "tests" / "serving" / "old_clients" / "test_forms.py").read_text(encoding="utf-8")


def test_the_table_of_inputs_is_up_to_date() -> None:
    assert migrating_page.updated(PAGE) == PAGE, "run python scripts/migrating_page.py"


def test_each_line_names_its_tests() -> None:
    section = PAGE.partition("## What is the same")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert rows
    tests = set(re.findall(r"^def (test_\w+)", FORMS, re.MULTILINE))
    for row in rows:
        named = set(re.findall(r"`(test_\w+)`", row))
        assert named and named <= tests, row


def test_each_client_has_its_versions() -> None:
    section = PAGE.partition("## Which clients")[2].partition("\n## ")[0]
    rows = [line.split("|")[2].strip() for line in section.splitlines() if line.startswith("| ")][1:]
    assert all(re.search(r"\d|none", versions) for versions in rows)
