"""Locust's side: a user for each way in, one that keeps an open-loop schedule, and the shape of a profile.

A closed user asks, waits for the answer, thinks, and asks again. `ScheduleUser` is a crowd: it sends every request of
the schedule when it is due, whether or not the ones before have been answered.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gevent
from gevent.pool import Group
from locust import LoadTestShape, User, task

from deepseek_triton.loadtest.arrivals import level_at
from deepseek_triton.loadtest.profile import LoadProfile, ProtocolName
from deepseek_triton.loadtest.session import Session

SPAWN_RATE = 100.0  # users/s: nearly at once; Locust warns of more


class ClosedUser(User):
    """One who waits for the answer before asking again."""

    abstract = True
    protocol: ClassVar[ProtocolName]
    session: ClassVar[Session]

    def wait_time(self) -> float:
        """The pause after an answer, in seconds."""
        return self.session.profile.think_s

    @task
    def ask(self) -> None:
        """Hold one conversation."""
        if self.session.is_over:
            gevent.sleep(0.1)  # until Locust stops this user
            return
        self.session.converse(self.session.next_talk(), self.protocol, self.session.recorder.now(), self.environment)


class GrpcStreamUser(ClosedUser):
    """Streams over gRPC."""

    protocol = "grpc-stream"


class GrpcUser(ClosedUser):
    """Takes the answer in one response over gRPC; a decoupled model has no other call than the stream's."""

    protocol = "grpc"


class HttpStreamUser(ClosedUser):
    """Streams over HTTP: `generate_stream`."""

    protocol = "http-stream"


class HttpUser(ClosedUser):
    """Takes the answer in one response over HTTP: `generate`."""

    protocol = "http"


CLOSED_USERS: tuple[type[ClosedUser], ...] = (GrpcStreamUser, GrpcUser, HttpStreamUser, HttpUser)


class ScheduleUser(User):
    """Everyone of an open-loop profile."""

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
        # Locust would begin this task again: the schedule is kept once.
        while not session.is_stopping:
            gevent.sleep(0.1)

    def _count_bug(self, greenlet: Any) -> None:
        self.session.num_bugs += 1


class ProfileShape(LoadTestShape):
    """How many users there are, second by second."""

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
    """Closed users at a moment, one at least; an open profile has the one that keeps its schedule."""
    if profile.arrivals == "open":
        return 1
    return max(round(level_at(profile, max(now_s, -profile.warmup_s))), 1)


def user_classes(session: Session) -> list[type[User]]:
    """The classes of one run, with its session and the protocols' shares."""
    if session.profile.arrivals == "open":
        return [type("Schedule", (ScheduleUser,), {"session": session})]
    return [
        type(user.__name__, (user,), {"session": session, "weight": session.profile.protocols[user.protocol]})
        for user in CLOSED_USERS
        if user.protocol in session.profile.protocols
    ]
