"""`make test` runs what failed once more: the names under which failures are kept must be those of the tests."""

from __future__ import annotations

import pytest

from tests.conftest import without_group


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tests/a.py::test_b@server", "tests/a.py::test_b"),
        ("tests/a.py::test_b[x@y]@tests/a.py", "tests/a.py::test_b[x@y]"),
        ("tests/a.py::test_b[x@y]", "tests/a.py::test_b[x@y]"),
        ("tests/a.py::test_b", "tests/a.py::test_b"),
    ],
)
def test_a_failure_is_kept_without_the_group_of_its_worker(name: str, wanted: str) -> None:
    assert without_group(name) == wanted
