"""Which models a start leaves out after others that they have spoilt."""

from __future__ import annotations

import pytest

from deepseek_triton.ensemble.server.left_out import RETRY_S, LeftOut

SERVED = {"a": ["a", "a-engine"], "b": ["b", "b-engine"]}


def test_the_second_death_in_a_row_leaves_a_model_out_and_its_parts_with_it() -> None:
    left_out = LeftOut(SERVED)
    assert left_out.blame(["b-engine"]) == [] and left_out.models == set()
    assert left_out.blame(["b"]) == ["b"]
    assert left_out.models == {"b", "b-engine"} and left_out.served == ["a"]


def test_a_start_that_went_well_forgets_the_first() -> None:
    left_out = LeftOut(SERVED)
    left_out.blame(["b"])
    left_out.has_started()
    assert left_out.blame(["b"]) == []


def test_the_last_model_is_never_left_out() -> None:
    left_out = LeftOut(SERVED)
    assert [left_out.blame(["a", "b"]) for _ in range(4)] == [[]] * 4
    assert left_out.served == ["a", "b"]


def test_unknown_models_are_blamed_for_nothing() -> None:
    left_out = LeftOut(SERVED)
    assert [left_out.blame(names) for names in ([], ["another"], [])] == [[]] * 3


def test_a_later_start_tries_it_again() -> None:
    now = 0.0
    left_out = LeftOut(SERVED, clock=lambda: now)
    for _ in range(2):
        left_out.blame(["b"])
    now = RETRY_S - 1
    left_out.forgive()
    assert left_out.models
    now = RETRY_S
    left_out.forgive()
    assert not left_out.models


@pytest.mark.parametrize(
    ("loaded", "hanging"),
    [(["a-engine", "a"], ["b"]), (["a-engine"], ["b"]), ([], []), (["a-engine", "b-engine"], [])],
)
def test_what_hangs_is_what_lacks_a_part_unless_everything_does(loaded: list[str], hanging: list[str]) -> None:
    assert LeftOut(SERVED).incomplete(loaded) == hanging
