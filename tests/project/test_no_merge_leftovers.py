"""No file holds what a merge that was not resolved leaves."""

from __future__ import annotations

import re

from tests.project.test_layout import ROOT, checkout

MARK = re.compile(rb"^(?:<{7} |>{7} |={7}$)", re.MULTILINE)


def test_no_file_holds_a_conflict() -> None:
    assert MARK.search(b"a\n<<<<<<< HEAD\n") and MARK.search(b"=======\n")
    found = [str(path) for path in checkout() if (ROOT / path).is_file() and MARK.search((ROOT / path).read_bytes())]
    assert found == []
