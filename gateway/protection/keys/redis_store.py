"""RedisKeys: keys in Redis, for gateways on several machines."""

from __future__ import annotations

import json
import time

from redis.asyncio import Redis

from deepseek_triton.gateway.protection.keys.api_key import ApiKey
from deepseek_triton.gateway.protection.keys.store import KeyStoreError
from deepseek_triton.gateway.protection.redis_pool import ERRORS, connection_pool

HASH = "deepseek-gateway:keys"  # id → the key's fields as JSON
KEPT_S = 1.0  # how long a key that was read holds


class RedisKeys:
    """A `KeyStore` in the Redis at `url`."""

    def __init__(self, url: str) -> None:
        self._pool = connection_pool(url)
        self._redis = Redis(connection_pool=self._pool)
        self._kept: dict[str, tuple[float, ApiKey]] = {}  # only keys that exist: strangers can't fill it

    async def find(self, key_id: str) -> ApiKey | None:
        """The key with this id, as it was a second ago at most."""
        read_at, key = self._kept.get(key_id, (0.0, None))
        if key is not None and time.monotonic() - read_at < KEPT_S:
            return key
        try:
            text = await self._redis.hget(HASH, key_id)
        except ERRORS as error:
            raise KeyStoreError(f"the keys in Redis can't be read: {error}") from error
        if text is None:
            self._kept.pop(key_id, None)
            return None
        key = _parse(text)
        self._kept[key_id] = (time.monotonic(), key)
        return key

    async def all(self) -> tuple[ApiKey, ...]:
        """All keys, the oldest first."""
        try:
            texts = await self._redis.hvals(HASH)
        except ERRORS as error:
            raise KeyStoreError(f"the keys in Redis can't be read: {error}") from error
        return tuple(sorted(map(_parse, texts), key=lambda key: key.created))

    async def add(self, key: ApiKey) -> None:
        """Keep one more."""
        await self.replace(key)

    async def replace(self, key: ApiKey) -> None:
        """Keep `key` instead of the one with its id."""
        try:
            await self._redis.hset(HASH, key.id, json.dumps(key.to_form()))
        except ERRORS as error:
            raise KeyStoreError(f"the keys in Redis can't be written: {error}") from error

    async def close(self) -> None:
        """Release the connections."""
        await self._pool.disconnect()


def _parse(text: str | bytes) -> ApiKey:
    try:
        return ApiKey.from_form(json.loads(text))
    except ValueError as error:
        raise KeyStoreError(f"a key in Redis can't be read: {error}") from error
