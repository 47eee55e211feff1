"""CallerSlots: requests that run at one time, of each caller and in all, in this process or, by Redis, in several."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from typing import Protocol, cast

from redis.asyncio import Redis

from deepseek_triton.gateway.protection.keys.caller import Caller
from deepseek_triton.gateway.protection.redis_pool import ERRORS, connection_pool

PREFIX = "deepseek-gateway:running:"
# Sorted sets of leases by their end. A worker that dies gives none back: they run out.
TAKE = """
for _, set in ipairs(KEYS) do redis.call('ZREMRANGEBYSCORE', set, '-inf', ARGV[1]) end
for i, set in ipairs(KEYS) do
  local limit = tonumber(ARGV[3 + i])
  if limit > 0 and redis.call('ZCARD', set) >= limit then return i end
end
for _, set in ipairs(KEYS) do
  redis.call('ZADD', set, ARGV[2], ARGV[3])
  redis.call('EXPIREAT', set, math.ceil(tonumber(ARGV[2])) + 1)
end
return 0
"""


class SlotsError(Exception):
    """Redis can't be asked now."""


class NoSlotError(Exception):
    """No more may run. is_own: of this caller; else in all."""

    def __init__(self, is_own: bool) -> None:
        super().__init__("no slot is free")
        self.is_own = is_own


class CallerSlots(Protocol):
    """Gives slots and takes them back."""

    async def take(self, caller: Caller) -> str:
        """One slot's name. Raises `NoSlotError`, `SlotsError`."""
        ...

    async def release(self, caller: Caller, slot: str) -> None:
        """Give a slot back. Raises `SlotsError`."""
        ...

    async def close(self) -> None:
        """Release the connections."""
        ...


class OwnSlots:
    """`CallerSlots` of one process. max_running: in all; 0: no limit."""

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self._running: Counter[str] = Counter()
        self._num_running = 0

    async def take(self, caller: Caller) -> str:
        """One slot; it needs no name here."""
        if caller.max_running and self._running[caller.id] >= caller.max_running:
            raise NoSlotError(is_own=True)
        if self._max_running and self._num_running >= self._max_running:
            raise NoSlotError(is_own=False)
        self._running[caller.id] += 1
        self._num_running += 1
        return ""

    async def release(self, caller: Caller, slot: str) -> None:
        """Give a slot back; callers that have none are forgotten."""
        self._num_running -= 1
        self._running[caller.id] -= 1
        if not self._running[caller.id]:
            del self._running[caller.id]

    async def close(self) -> None:
        """Nothing is open."""


class SharedSlots:
    """`CallerSlots` of all processes that use the Redis at `url`. lease_s: longer than any request runs."""

    def __init__(self, url: str, max_running: int, lease_s: float) -> None:
        self._pool = connection_pool(url)
        self._redis = Redis(connection_pool=self._pool)
        self._take = self._redis.register_script(TAKE)
        self._max_running = max_running
        self._lease_s = lease_s

    async def take(self, caller: Caller) -> str:
        """One slot, under a random name."""
        slot, now = uuid.uuid4().hex, time.time()
        limits = (caller.max_running, self._max_running)
        try:
            refused_by = cast(int, await self._take(_sets(caller), (now, now + self._lease_s, slot, *limits)))
        except ERRORS as error:
            raise SlotsError(str(error)) from error
        if refused_by:
            raise NoSlotError(is_own=refused_by == 1)
        return slot

    async def release(self, caller: Caller, slot: str) -> None:
        """Give a slot back."""
        try:
            async with self._redis.pipeline() as pipeline:
                for name in _sets(caller):
                    pipeline.zrem(name, slot)
                await pipeline.execute()
        except ERRORS as error:
            raise SlotsError(str(error)) from error

    async def close(self) -> None:
        """Release the connections."""
        await self._pool.disconnect()


def _sets(caller: Caller) -> tuple[str, str]:
    """The caller's own, and that of all."""
    return f"{PREFIX}of:{caller.id}", f"{PREFIX}all"
