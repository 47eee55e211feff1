"""Roster: the servers of a pool as they come and go. One that is gone is closed when its last request has ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from deepseek_triton.gateway.backend.routing.member import Member, Server
from deepseek_triton.gateway.backend.routing.prober import Prober
from deepseek_triton.gateway.jobs.ending import end_tasks

log = logging.getLogger(__name__)

RETIRE_LOOK_S = 0.1  # whether a server that is found no more still has requests


@dataclass(frozen=True)
class Discovery:
    """How servers are found. find: the addresses of all that there are now, or `OSError`. make: address → server."""

    find: Callable[[], Awaitable[Sequence[str]]]
    make: Callable[[str], Server]


class Roster:
    """Adds to `members`, and takes from them; new ones are opened and probed first. make: address, server → member."""

    def __init__(
        self,
        members: list[Member],
        prober: Prober,
        discovery: Discovery,
        make: Callable[[str, Server], Member],
        interval_s: float,
    ) -> None:
        self._members, self._prober, self._discovery = members, prober, discovery
        self._make, self._interval_s = make, interval_s
        self._retiring: dict[str, tuple[Member, asyncio.Task[None]]] = {}
        self._finding: asyncio.Task[None] | None = None
        self._is_found = True

    async def start(self) -> None:
        """Look once, and go on looking."""
        await self._find()
        self._finding = asyncio.create_task(self._go_on())

    async def stop(self) -> None:
        """End it, and close the servers that were on their way out."""
        retiring = [task for _, task in self._retiring.values()]
        await end_tasks([*retiring, *([self._finding] if self._finding else [])])
        await asyncio.gather(*(member.server.close() for member, _ in self._retiring.values()))

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self._find()
            except Exception:
                log.exception("servers can't be looked for; the next try is in %g s", self._interval_s)

    async def _find(self) -> None:
        try:
            found = await self._discovery.find()
        except OSError as error:
            if self._is_found:
                log.warning("servers aren't found now, and those that are known stay: %s", error)
            self._is_found = False
            return
        self._is_found = True
        known = {member.address for member in self._members}
        for member in [member for member in self._members if member.address not in found]:
            log.info("the server at %s is there no more: it gets no new requests", member.address)
            self._members.remove(member)
            self._retiring[member.address] = member, asyncio.create_task(self._retire(member))
        new = [address for address in found if address not in known]
        outcomes = await asyncio.gather(*map(self._add, new), return_exceptions=True)
        for address, outcome in zip(new, outcomes, strict=True):
            if isinstance(outcome, Exception):
                log.error("the server at %s can't be added now: %r", address, outcome, exc_info=outcome)

    async def _add(self, address: str) -> None:
        if address in self._retiring:  # it is back before its last request has ended
            member, task = self._retiring.pop(address)
            await end_tasks([task])
            self._members.append(member)
            return
        log.info("a server was found at %s", address)
        member = self._make(address, self._discovery.make(address))
        await member.server.open()
        await self._prober.watch(member)
        self._members.append(member)

    async def _retire(self, member: Member) -> None:
        while member.running:
            await asyncio.sleep(RETIRE_LOOK_S)
        del self._retiring[member.address]
        await self._prober.forget(member)
        member.forgotten()
        await member.server.close()
