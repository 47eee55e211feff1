"""Shares: who gets which arm, and what a file may hold."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest

from deepseek_triton.gateway.backend.routing.shares import Arm, Route, RouteFile, read_routes, write_routes
from deepseek_triton.gateway.backend.watched_file import LOOK_S

CALLERS = [f"key-{index}" for index in range(2000)]


def route(weight: float, by: str = "caller") -> Route:
    return Route((Arm("old", 100 - weight), Arm("new", weight)), by)  # type: ignore[arg-type]


def on_the_new(weight: float) -> set[str]:
    return {caller for caller in CALLERS if route(weight).pick("r1", caller, 0.0) == "new"}


@pytest.mark.slow
def test_a_share_grows_and_takes_nobody_back() -> None:
    steps = [on_the_new(weight) for weight in (0, 1, 10, 50, 100)]
    for (smaller, larger), share in zip(pairwise(steps), (0.01, 0.1, 0.5, 1.0), strict=True):
        assert smaller <= larger
        assert abs(len(larger) / len(CALLERS) - share) < 0.03
    assert not steps[0] and len(steps[-1]) == len(CALLERS)


def test_requests_are_dealt_whoever_sends_them() -> None:
    picked = [route(25, "request").pick("r1", "one key", lot / 1000) for lot in range(1000)]
    assert picked.count("new") == 250


@pytest.mark.slow
def test_a_file_is_read_again_and_a_wrong_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "routes.json"
    routes = RouteFile(str(path))
    assert routes.current() == {}
    for weight in (1, 10):
        write_routes(path, {"r1": route(weight)})
        time.sleep(LOOK_S + 0.01)
        assert routes.current() == {"r1": route(weight)}
    path.write_text("{", encoding="utf-8")
    time.sleep(LOOK_S + 0.01)
    assert routes.current() == {"r1": route(10)} and "still holds" in caplog.text
    path.unlink()
    time.sleep(LOOK_S + 0.01)
    assert routes.current() == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "an object"),
        ({"routes": {"r1": {}}}, "the route 'r1': it must be"),
        ({"routes": {"r1": {"arms": []}}}, "weight is above 0"),
        ({"routes": {"r1": {"arms": [{"model": "a", "weight": 0}]}}}, "weight is above 0"),
        ({"routes": {"r1": {"arms": [{"model": "a", "weight": -1}]}}}, "at least 0, got -1"),
        ({"routes": {"r1": {"arms": [{"model": "a", "weight": True}]}}}, "must be a number, got True"),
        ({"routes": {"r1": {"arms": [{"model": "a", "weight": "1"}]}}}, "must be a number, got '1'"),
        ({"routes": {"r1": {"arms": [{"model": "", "weight": 1}]}}}, "must be a model's name"),
        ({"routes": {"r1": {"arms": [{"model": "a", "weight": 1}, {"model": "a", "weight": 1}]}}}, "once"),
        ({"routes": {"r1": {"arms": [{"model": "a", "weight": 1, "x": 1}]}}}, "an arm must be"),
        ({"routes": {"r1": {"arms": [{"model": "a", "weight": 1}], "by": "moon"}}}, "by must be one of"),
    ],
)
def test_what_a_file_may_not_hold(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_routes(json.dumps(given))
