"""Prober: asks each server again and again whether it lives and which models it has, before a request finds out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from deepseek_triton.clients import ClientError, RequestTimeout, ServerUnavailable
from deepseek_triton.gateway.backend.routing.member import Member
from deepseek_triton.gateway.jobs.ending import end_tasks

HANGING = 2  # probes in a row without an answer in time
LOST_INTERVAL_S = 0.5  # between probes of a server that isn't there
LOOK_AGAIN_S = 1.0  # a model that nobody has makes it ask again, this long after the last time


class Prober:
    """Keeps the state of `members` true: those that are watched, and that others may be added to.

    Args:
        interval_s: between probes of one server.
        timeout_s: for an answer.
        hang_s: seconds without an answer after which all that runs on a server is broken off. What waits for the first
            part of an answer is broken off earlier, if another server is there: it can be sent again.
        probed: called after each probe of a server.
    """

    def __init__(
        self,
        members: Sequence[Member],
        interval_s: float,
        timeout_s: float,
        hang_s: float,
        probed: Callable[[Member], object],
    ) -> None:
        self._members = members
        self._interval_s, self._timeout_s, self._hang_s = interval_s, timeout_s, hang_s
        self._probed = probed
        self._kicks: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = time.monotonic()

    async def start(self) -> None:
        """Probe each server once, and go on doing so."""
        await asyncio.gather(*(self.watch(member) for member in self._members))

    async def watch(self, member: Member) -> None:
        """Probe one server once, and go on doing so."""
        first = asyncio.Event()
        self._kicks[member.address] = asyncio.Event()
        self._tasks[member.address] = asyncio.create_task(self._watch(member, first))
        await first.wait()

    async def forget(self, member: Member) -> None:
        """Probe it no more."""
        del self._kicks[member.address]
        await end_tasks([self._tasks.pop(member.address)])

    async def stop(self) -> None:
        """End it."""
        await end_tasks([*self._tasks.values(), *([self._looking] if self._looking else [])])

    def kick(self, member: Member) -> None:
        """Probe it now: a request has lost it."""
        if event := self._kicks.get(member.address):
            event.set()

    async def look_again(self) -> None:
        """Ask the servers that are there which models they have, once a second at most."""
        if self._looking is None or self._looking.done():
            if time.monotonic() - self._looked_at < LOOK_AGAIN_S:
                return
            self._looked_at = time.monotonic()
            self._looking = asyncio.create_task(self._look())
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        await asyncio.gather(*(self._probe(member) for member in self._members if member.is_up))

    async def _watch(self, member: Member, first: asyncio.Event) -> None:
        num_late, answered_at, kick = 0, time.monotonic(), self._kicks[member.address]
        while True:
            was_up, is_late = member.is_up, await self._probe(member)
            self._probed(member)
            first.set()
            num_late = num_late + 1 if is_late else 0
            if not is_late:
                answered_at = time.monotonic()
                if member.is_up and not was_up and member.known:
                    member.server.reconnect()  # what runs ends on the old connections
            elif num_late >= HANGING:
                self._leave(member, time.monotonic() - answered_at)
            kick.clear()
            interval_s = self._interval_s if member.is_up and not is_late else min(self._interval_s, LOST_INTERVAL_S)
            await _wait(kick, interval_s)

    async def _probe(self, member: Member) -> bool:
        """Ask one server; whether it has given no answer in time."""
        asking = asyncio.ensure_future(member.server.models())
        try:
            # Not `wait_for`, which may lose a cancellation before Python 3.12.
            done, _ = await asyncio.wait({asking}, timeout=self._timeout_s)
            if not done:
                return True
            member.found(asking.result())
        except RequestTimeout:
            return True
        except ServerUnavailable as error:
            member.lost(error)
        except ClientError as error:  # it answers, and doesn't name its models
            member.found((), error)
        except Exception as error:  # whatever it is, the probes must go on
            member.lost(repr(error))
        finally:
            asking.cancel()
        return False

    def _leave(self, member: Member, silent_s: float) -> None:
        """A server hangs."""
        member.lost(f"no answer for {silent_s:.0f} s")
        member.server.reconnect()
        if silent_s >= self._hang_s:
            member.server.break_off(only_waiting=False)
        elif any(other.is_up and set(member.known) & set(other.models) for other in self._members):
            member.server.break_off(only_waiting=True)


async def _wait(event: asyncio.Event, limit_s: float) -> None:
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait({waiting}, timeout=limit_s)
    waiting.cancel()
