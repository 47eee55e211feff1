"""Locust's users: one class for each protocol, one for open arrivals, and the number of users over time.

A closed user asks, waits for the answer, pauses, and asks again. `ScheduleUser` stands for all users of an open
profile: it sends every request of the schedule when it is due, whether or not earlier ones have been answered.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gevent
from gevent.pool import Group
from locust import LoadTestShape, User, task

from deepseek_triton.loadtest.arrivals import level_at
from deepseek_triton.loadtest.profile import LoadProfile, ProtocolName
from deepseek_triton.loadtest.session import Session

SPAWN_RATE = 100.0  # users/s; Locust warns about a higher rate


class ClosedUser(User):
    """A user who waits for the answer before asking again."""

    abstract = True
    protocol: ClassVar[ProtocolName]
    session: ClassVar[Session]

    def wait_time(self) -> float:
        """The pause after an answer, in seconds."""
        return self.session.profile.think_s

    @task
    def ask(self) -> None:
        """Run one conversation."""
        if self.session.is_over:
            gevent.sleep(0.1)  # until Locust stops this user
            return
        self.session.converse(self.session.next_talk(), self.protocol, self.session.recorder.now(), self.environment)


class GrpcStreamUser(ClosedUser):
    """Streams over gRPC."""

    protocol = "grpc-stream"


class GrpcUser(ClosedUser):
    """Gets the answer in one response over gRPC, by the stream call: a decoupled model has no other."""

    protocol = "grpc"


class HttpStreamUser(ClosedUser):
    """Streams over HTTP: `generate_stream`."""

    protocol = "http-stream"


class HttpUser(ClosedUser):
    """Gets the answer in one response over HTTP: `generate`."""

    protocol = "http"


class OpenAiStreamUser(ClosedUser):
    """Streams through the gateway, as server-sent events of OpenAI's API."""

    protocol = "openai-stream"


class OpenAiUser(ClosedUser):
    """Gets the answer in one response from the gateway."""

    protocol = "openai"


CLOSED_USERS: tuple[type[ClosedUser], ...] = (
    GrpcStreamUser,
    GrpcUser,
    HttpStreamUser,
    HttpUser,
    OpenAiStreamUser,
    OpenAiUser,
)


class ScheduleUser(User):
    """Sends all requests of an open profile."""

    abstract = True
    fixed_count = 1
    session: ClassVar[Session]

    @task
    def keep_schedule(self) -> None:
        """Send every request when it is due, then wait for the last answer."""
        session, crowd = self.session, Group()
        for due_s in session.schedule or ():
            session.sleep_until(due_s)
            if session.is_stopping:
                break
            talk = session.next_talk()
            greenlet = crowd.spawn(session.converse, talk, talk.protocol, due_s, self.environment)
            greenlet.link_exception(self._count_bug)
        crowd.join()
        # Locust would start this task again, but the schedule runs once.
        while not session.is_stopping:
            gevent.sleep(0.1)

    def _count_bug(self, greenlet: Any) -> None:
        self.session.num_bugs += 1


class ProfileShape(LoadTestShape):
    """The number of users over time."""

    def __init__(self, session: Session) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._session = session

    def tick(self) -> tuple[int, float] | None:
        """Users and spawn rate; None: the run is over."""
        session = self._session
        now = session.recorder.now() if session.is_started else -session.profile.warmup_s
        if session.is_started and session.is_over:
            return None
        return num_users(session.profile, now), SPAWN_RATE


def num_users(profile: LoadProfile, now_s: float) -> int:
    """Number of closed users at a time, at least one; an open profile has one user, who keeps the schedule."""
    if profile.arrivals == "open":
        return 1
    return max(round(level_at(profile, max(now_s, -profile.warmup_s))), 1)


def user_classes(session: Session) -> list[type[User]]:
    """The user classes of one run, with its session and with the protocols' shares as weights."""
    if session.profile.arrivals == "open":
        return [type("Schedule", (ScheduleUser,), {"session": session})]
    return [
        type(user.__name__, (user,), {"session": session, "weight": session.profile.protocols[user.protocol]})
        for user in CLOSED_USERS
        if user.protocol in session.profile.protocols
    ]
