"""Promotion: shares rise while the candidate does well, fall back by themselves, and a killed run goes on."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.digest import digest_of
from deepseek_triton.builders.lifecycle.gate.report import LimitVerdict, Report
from deepseek_triton.builders.lifecycle.promotion import promote as module
from deepseek_triton.builders.lifecycle.promotion.arm_figures import CanaryBounds, read_figures
from deepseek_triton.builders.lifecycle.promotion.options import PromoteOptions
from deepseek_triton.builders.lifecycle.promotion.promote import promote, rollback
from deepseek_triton.builders.lifecycle.promotion.route import arms_of, next_name, routed_models, write_route
from deepseek_triton.builders.lifecycle.promotion.state import (
    PROMOTED,
    ROLLED_BACK,
    ROLLING_BACK,
    RUNNING,
    PromotionFile,
)
from deepseek_triton.gateway.backend.routing.shares import Arm, read_routes
from tests.support.checkpoints import write_tiny


@dataclass
class FakeControl:
    """Remembers what is loaded."""

    loaded: set[str] = field(default_factory=lambda: {"r1"})
    fails: bool = False

    def load(self, model: str) -> None:
        if self.fails:
            raise BuildError("it doesn't load")
        self.loaded.add(model)

    def unload(self, model: str, timeout_s: float) -> None:
        self.loaded.discard(model)


@dataclass
class FakeGateway:
    """Serves metrics as if each look had brought so many requests more to each arm that has a weight."""

    routes: Path
    failing: str = ""
    slow: str = ""
    opens: str = ""
    idle: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)

    def text(self) -> str:
        lines = ["# HELP x y"]
        arms = arms_of(self.routes, "r1")
        self.shares.append(arms.get("r1-v2", 0))
        for model, weight in arms.items():
            if weight and model != self.idle:
                self.counts[model] = self.counts.get(model, 0) + 30
            count = self.counts.get(model, 0)
            outcome = "failed" if model == self.failing else "answered"
            seconds = count * (1.0 if model == self.slow else 0.1)
            labels = f'model="{model}",name="r1"'
            lines += [
                f'gateway_arm_requests_total{{{labels},outcome="{outcome}"}} {count}.0',
                f'gateway_arm_requests_total{{{labels},outcome="given_up"}} 7.0',
                f"gateway_arm_seconds_sum{{{labels}}} {seconds}",
                f"gateway_arm_seconds_count{{{labels}}} {count}",
                f'gateway_breaker_opened_total{{backend="b",model="{model}"}} {count * (model == self.opens)}',
            ]
        return "\n".join(lines)


@contextlib.contextmanager
def serving(gateway: FakeGateway) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(gateway.text().encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("POLL_S", 0.01), ("SETTLE_S", 0.0), ("BLIND_S", 0.05)):
        monkeypatch.setattr(module, name, value)


@dataclass
class World:
    """A repository with r1, a candidate that passed, and what the promotion did."""

    directory: Path
    control: FakeControl = field(default_factory=FakeControl)
    built: list[tuple[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.repository / "r1").mkdir(parents=True)
        write_tiny(self.candidate)
        self.report()

    @property
    def repository(self) -> Path:
        return self.directory / "models"

    @property
    def candidate(self) -> Path:
        return self.directory / "candidate"

    @property
    def routes(self) -> Path:
        return self.directory / "routes.json"

    def report(self, *, passed: bool = True, sha256: str = "") -> None:
        found = sha256 or digest_of(open_checkpoint(self.candidate))
        verdict = LimitVerdict("old_data", passed, "1", "1", "0", "so it is")
        Report({"name": "c", "sha256": found}, {"name": "b", "sha256": "1"}, (verdict,), {}, (), "", "").save(
            self.directory / "report"
        )

    def promote(self, url: str, **more: Any) -> Any:
        options = PromoteOptions(
            "r1", self.candidate, self.directory / "report", self.repository, self.routes, (url,),
            **{"stage_s": 0.0, "max_stage_s": 0.5, "builds": True, **more},
        )  # fmt: skip

        def build_as(old: str, new: str) -> None:
            self.built.append((old, new))
            (self.repository / new).mkdir()
            (self.repository / new / "config.pbtxt").touch()

        control: Any = self.control
        return promote(options, build_as, control, self.lines.append)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.slow
def test_shares_rise_to_all_and_the_old_model_is_unloaded(world: World) -> None:
    gateway = FakeGateway(world.routes)
    with serving(gateway) as url:
        promotion = world.promote(url)
    assert (promotion.status, promotion.old, promotion.new) == (PROMOTED, "r1", "r1-v2")
    assert list(dict.fromkeys(gateway.shares)) == [1, 10, 50, 100]
    assert world.control.loaded == {"r1-v2"} and world.built == [("r1", "r1-v2")]
    route = read_routes(world.routes.read_text(encoding="utf-8"))["r1"]  # as the gateway reads it
    assert route.arms == (Arm("r1", 0.0), Arm("r1-v2", 100.0)) and route.by == "caller"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "why"),
    [("failing", "requests failed"), ("slow", "times as long"), ("opens", "breaker"), ("idle", "too few")],
)
def test_a_candidate_that_does_worse_is_rolled_back_by_itself(fault: str, why: str, world: World) -> None:
    gateway = FakeGateway(world.routes)
    setattr(gateway, fault, "r1-v2")
    with serving(gateway) as url:
        promotion = world.promote(url)
    assert promotion.status == ROLLED_BACK and why in promotion.why
    assert arms_of(world.routes, "r1") == {"r1": 100, "r1-v2": 0}
    assert world.control.loaded == {"r1"}


def test_a_candidate_that_nobody_can_watch_is_rolled_back(world: World) -> None:
    promotion = world.promote("http://127.0.0.1:1")
    assert promotion.status == ROLLED_BACK and "metrics" in promotion.why


@pytest.mark.parametrize("report", [{"passed": False}, {"sha256": "another"}])
def test_without_a_passing_report_of_the_candidate_nothing_happens(report: dict[str, Any], world: World) -> None:
    world.report(**report)
    with pytest.raises(BuildError, match=r"didn't pass|run the gate"):
        world.promote("http://127.0.0.1:1")
    assert not world.routes.exists() and not world.built and world.control.loaded == {"r1"}


@pytest.mark.slow
def test_a_candidate_that_does_not_load_gets_no_request(world: World) -> None:
    world.control.fails = True
    with pytest.raises(BuildError, match="doesn't load"):
        world.promote("http://127.0.0.1:1")
    assert arms_of(world.routes, "r1") == {"r1": 100, "r1-v2": 0}
    world.control.fails = False
    with serving(FakeGateway(world.routes)) as url:
        assert world.promote(url).new == "r1-v2"
    assert world.built == [("r1", "r1-v2")]  # once


class Killed(BaseException):
    """Ends a run as a signal would: nothing of it is handled."""


@pytest.mark.slow
@pytest.mark.parametrize("line", ["building", "loading", "has 1 %", "has 10 %", "has 100 %", "unloading"])
def test_a_promotion_killed_in_each_phase_goes_on(line: str, world: World) -> None:
    class Lines(list[str]):
        def append(self, text: str) -> None:
            super().append(text)
            if line in text and not any(line in earlier for earlier in self[:-1]):
                raise Killed

    world.lines = Lines()
    with serving(FakeGateway(world.routes)) as url:
        with pytest.raises(Killed):
            world.promote(url)
        found = PromotionFile(world.repository, "r1").load()
        assert found is not None and found.status == RUNNING
        assert sum(arms_of(world.routes, "r1").values()) in (0, 100)
        assert world.promote(url).status == PROMOTED
        assert world.promote(url).status == PROMOTED  # and again: nothing is left to do
    assert world.built in ([("r1", "r1-v2")], [])
    assert world.control.loaded == {"r1-v2"}


@pytest.mark.slow
def test_a_rollback_brings_the_old_model_back(world: World) -> None:
    control: Any = world.control
    with pytest.raises(BuildError, match="no promotion"):
        rollback(world.repository, "r1", world.routes, control)
    with serving(FakeGateway(world.routes)) as url:
        world.promote(url)
    assert rollback(world.repository, "r1", world.routes, control).status == ROLLED_BACK
    assert world.control.loaded == {"r1"} and arms_of(world.routes, "r1")["r1"] == 100
    with pytest.raises(BuildError, match="no promotion"):
        rollback(world.repository, "r1", world.routes, control)


def test_a_rollback_that_was_ended_goes_on(world: World) -> None:
    control: Any = world.control

    def end(line: str) -> None:
        raise Killed

    with serving(FakeGateway(world.routes)) as url:
        world.promote(url)
        with pytest.raises(Killed):  # the old model answers, and the new one is still loaded
            rollback(world.repository, "r1", world.routes, control, end)
        found = PromotionFile(world.repository, "r1").load()
        assert found is not None and found.status == ROLLING_BACK and world.control.loaded == {"r1", "r1-v2"}
        with pytest.raises(BuildError, match="run `rollback` again"):
            world.promote(url)
    assert rollback(world.repository, "r1", world.routes, control).status == ROLLED_BACK
    assert world.control.loaded == {"r1"}


def test_a_candidate_whose_checkpoint_alone_was_judged_is_not_promoted(world: World) -> None:
    with pytest.raises(BuildError, match="run the gate with --name r1"):
        world.promote("http://127.0.0.1:1", builds=False)
    assert not world.built and not world.routes.exists()


@pytest.mark.slow
def test_the_next_promotion_replaces_what_answers_now(world: World) -> None:
    (world.repository / "r1-v2").mkdir()
    write_route(world.routes, "r1", {"r1-v2": 100.0}, "caller")
    write_route(world.routes, "other", {"x": 1.0}, "request")
    assert next_name(world.repository, "r1") == "r1-v3"
    with serving(FakeGateway(world.routes)) as url:
        promotion = world.promote(url, keeps_old=True)
    assert (promotion.old, promotion.new) == ("r1-v2", "r1-v3")
    assert arms_of(world.routes, "other") == {"x": 1.0} and "r1" in world.control.loaded


def test_a_server_loads_what_the_routes_name(tmp_path: Path) -> None:
    routes = tmp_path / "routes.json"
    models = {name: [name] for name in ("r1", "r1-v2", "r1-v3", "r2", "r1-vision")}
    assert set(routed_models(routes, models)) == {"r1", "r2", "r1-vision"}
    write_route(routes, "r1", {"r1": 0.0, "r1-v3": 100.0}, "caller")
    assert set(routed_models(routes, models)) == {"r1-v3", "r2", "r1-vision"}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"routes": []}'])
def test_a_damaged_route_file_is_told(text: str, tmp_path: Path) -> None:
    (path := tmp_path / "routes.json").write_text(text, encoding="utf-8")
    with pytest.raises(BuildError, match=r"routes\.json"):
        arms_of(path, "r1")


@pytest.mark.parametrize(
    "change",
    [{"shares": ()}, {"shares": (10, 5, 100)}, {"shares": (50,)}, {"shares": (0, 100)}, {"shares": (float("nan"), 100)},
     {"gateways": ()}, {"by": "luck"}, {"stage_s": 9.0, "max_stage_s": 1.0}, {"bounds": CanaryBounds(0)}],
)  # fmt: skip
def test_an_option_out_of_range_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    given = {"gateways": ("http://x",), **change}
    with pytest.raises(BuildError):
        PromoteOptions("r1", tmp_path, tmp_path, tmp_path, tmp_path, **given)


def test_figures_are_of_one_arm_of_one_name() -> None:
    text = 'gateway_arm_requests_total{model="a",name="n",outcome="failed"} 3.0\n'
    assert read_figures(text, "n", "a").failed == 3
    assert read_figures(text, "n", "b").failed == read_figures(text, "m", "a").failed == 0
