"""CallerRates: requests and tokens of a minute, counted by the library `limits`, in memory or in Redis."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage

from deepseek_triton.gateway.protection.keys.caller import Caller
from deepseek_triton.gateway.protection.redis_pool import connection_pool

WINDOW_S = 60
# Tokens are counted when they are used, though they exceed the limit: those that follow wait the longer.
UNLIMITED = 2**53


@dataclass(frozen=True)
class RateState:
    """One limit now. limit, remaining: requests or tokens. wait_s: until there is room; reset_s: until all is free."""

    kind: str
    limit: int
    remaining: int
    wait_s: float
    reset_s: float


class CallerRates:
    """Counts in windows that slide: what the last minute holds is the present window and a part of the one before.

    Args:
        redis_url: the Redis that counts; "": this process's memory.

    Every method but `close` raises `limits.errors.StorageError` where Redis doesn't answer.
    """

    def __init__(self, redis_url: str) -> None:
        self._storage: MemoryStorage | RedisStorage
        self._pool = connection_pool(redis_url) if redis_url else None
        if redis_url:
            self._storage = RedisStorage(
                f"async+{redis_url}",
                wrap_exceptions=True,
                implementation="redispy",
                connection_pool=self._pool,  # type: ignore[arg-type]  # its own type has no objects
            )
        else:
            self._storage = MemoryStorage()

    async def take(self, caller: Caller) -> tuple[RateState, ...]:
        """Count one request, if there is room for it; each limit's state then. No room: its `wait_s` isn't 0."""
        states: list[RateState] = []
        for kind, limit in (("tokens", caller.tokens_per_minute), ("requests", caller.requests_per_minute)):
            if not limit:
                continue
            state = await self._state(kind, limit, caller)
            if kind == "requests" and state.wait_s == 0 and not any(before.wait_s for before in states):
                has_room = await self._storage.acquire_sliding_window_entry(
                    _name(kind, limit, caller), limit, WINDOW_S, 1
                )
                left = max(state.remaining - 1, 0)
                # Another request can have taken the last place meanwhile.
                state = RateState(kind, limit, left, 0.0 if has_room else 1.0, state.reset_s or WINDOW_S)
            states.append(state)
        return tuple(states)

    async def charge(self, caller: Caller, num_tokens: int) -> None:
        """Count tokens that a request has used."""
        if caller.tokens_per_minute and num_tokens:
            name = _name("tokens", caller.tokens_per_minute, caller)
            await self._storage.acquire_sliding_window_entry(name, UNLIMITED, WINDOW_S, num_tokens)

    async def close(self) -> None:
        """Release the connections."""
        if self._pool is not None:
            await self._pool.disconnect()

    async def _state(self, kind: str, limit: int, caller: Caller) -> RateState:
        name = _name(kind, limit, caller)
        before, before_left_s, present, _ = await self._storage.get_sliding_window(name, WINDOW_S)
        rest_s = WINDOW_S - time.time() % WINDOW_S  # of the present window
        weighted = before * before_left_s / WINDOW_S + present
        reset_s = rest_s + WINDOW_S if present else (before_left_s if before else 0.0)
        wait_s = _wait_s(before, before_left_s, present, limit, rest_s)
        return RateState(kind, limit, max(0, limit - math.ceil(weighted)), wait_s, reset_s)


def _wait_s(before: int, before_left_s: float, present: int, limit: int, rest_s: float) -> float:
    """The seconds until one more fits: the window before leaves bit by bit, and then the present one."""
    if math.floor(before * before_left_s / WINDOW_S + present) + 1 <= limit:
        return 0.0
    if present < limit:
        return max(before_left_s - (limit - present) * WINDOW_S / before, 0.0) + 0.001
    return rest_s + max(WINDOW_S * (1 - limit / present), 0.0) + 0.001


def _name(kind: str, limit: int, caller: Caller) -> str:
    return RateLimitItemPerMinute(limit, namespace="deepseek-gateway").key_for(kind, caller.id)
