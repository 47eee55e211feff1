"""The supervisor restarts the server, waits longer each time, and tells the true reason."""

from __future__ import annotations

import random
import signal

import pytest

from deepseek_triton.ensemble.server.backoff import Backoff
from deepseek_triton.ensemble.server.installation import ServerDiedError
from deepseek_triton.ensemble.server.log import death
from deepseek_triton.ensemble.server.supervisor import STABLE_S, supervise
from deepseek_triton.ensemble.server.tritonserver import ServerError


class EndedError(Exception):
    """The test has seen enough."""


class FakeServer:
    """Starts as it is told; each start lasts `ready_s` on a clock of its own."""

    def __init__(self, starts: list[Exception | None], ready_s: float = 1.0) -> None:
        self._starts = iter(starts)
        self._ready_s = ready_s
        self.now = 0.0
        self.is_running = False

    def start(self) -> None:
        assert not self.is_running
        try:
            error = next(self._starts)
        except StopIteration:
            raise EndedError from None
        if error is not None:
            raise error
        self.is_running = True

    def wait_for_fault(self) -> str:
        self.now += self._ready_s
        return "tritonserver was killed by SIGKILL"

    def stop(self) -> None:
        self.is_running = False


def run(server: FakeServer, max_restarts: int | None = None) -> tuple[list[str], list[float], int]:
    """The reasons, the waits and how often it was said to be ready."""
    reasons: list[str] = []
    waits: list[float] = []
    ready: list[object] = []

    def note(reason: str, wait_s: float) -> None:
        reasons.append(reason)
        waits.append(wait_s)

    end: type[Exception] = EndedError if max_restarts is None else ServerError
    with pytest.raises(end):
        supervise(
            server,  # type: ignore[arg-type]
            on_ready=ready.append,
            on_restart=note,
            max_restarts=max_restarts,
            backoff=Backoff(random.Random(1)),
            clock=lambda: server.now,
            sleep=lambda seconds: None,
        )
    assert not server.is_running
    return reasons, waits, len(ready)


def test_it_never_gives_up_and_waits_longer_each_time() -> None:
    reasons, waits, ready = run(FakeServer([None] * 200))
    assert len(waits) == 200 and ready == 1
    assert waits[0] == 1.0 and all(1.0 <= wait <= 60.0 for wait in waits)
    assert all(wait >= 30.0 for wait in waits[8:]) and len(set(waits[8:])) > 100  # jitter
    assert set(reasons) == {"tritonserver was killed by SIGKILL"}


def test_a_server_that_was_well_for_a_minute_is_started_again_soon() -> None:
    _, waits, _ = run(FakeServer([None] * 20, ready_s=STABLE_S))
    assert set(waits) == {1.0}
    _, waits, _ = run(FakeServer([None] * 50, ready_s=STABLE_S))
    assert len(waits) == 50


def test_a_death_during_a_start_is_tried_again() -> None:
    reasons, _, ready = run(FakeServer([ServerDiedError("killed by SIGKILL"), ServerDiedError("died"), None]))
    assert reasons == ["killed by SIGKILL", "died", "tritonserver was killed by SIGKILL"] and ready == 1


def test_a_refusal_ends_the_first_start_alone() -> None:
    server = FakeServer([ServerError("port 8000 is in use")])
    with pytest.raises(ServerError, match="in use"):
        supervise(server, on_ready=print, on_restart=print, sleep=lambda _: None)  # type: ignore[arg-type]
    reasons, _, _ = run(FakeServer([None, ServerError("port 8000 is in use"), None]))
    assert reasons[1] == "port 8000 is in use" and len(reasons) == 3


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_those_who_want_an_end_get_one(limit: int) -> None:
    reasons, _, _ = run(FakeServer([None] * 10), max_restarts=limit)
    assert len(reasons) == limit


def test_restarts_count_in_a_row() -> None:
    server = FakeServer([None] * 10, ready_s=STABLE_S)
    with pytest.raises(EndedError):
        supervise(
            server,  # type: ignore[arg-type]
            on_ready=lambda _: None, on_restart=lambda *_: None, max_restarts=1,
            clock=lambda: server.now, sleep=lambda _: None,
        )  # fmt: skip


CUDA = 'E1123 22:10:05.929407 1 server.cc:241] "CudaDriverHelper has not been initialized."\n'
CUDA += "W1123 cuda.cc:1] CUDA driver version is insufficient\n"


@pytest.mark.parametrize(
    ("log", "status", "reason"),
    [
        (CUDA, -signal.SIGKILL, "tritonserver was killed by SIGKILL"),
        (CUDA, -signal.SIGSEGV, "tritonserver was killed by SIGSEGV"),
        ("", -signal.SIGABRT, "tritonserver was killed by SIGABRT"),
        (
            CUDA + "the engine's process was killed by SIGKILL; ending the server, which would hang\n" + CUDA,
            -signal.SIGKILL,
            "tritonserver was ended: the engine's process was killed by SIGKILL",
        ),
        (
            "the tokenizer's process is stopped by a signal; ending the server, which would hang\n",
            -signal.SIGKILL,
            "tritonserver was ended: the tokenizer's process is stopped by a signal",
        ),
        ("error: creating server: no memory\n", 1, "tritonserver ended with status 1: no memory"),
    ],
)
def test_the_reason_is_the_true_one(log: str, status: int, reason: str) -> None:
    assert death(log, status) == reason
