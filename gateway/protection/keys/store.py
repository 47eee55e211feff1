"""KeyStore: where keys are kept, a file or Redis."""

from __future__ import annotations

from typing import Protocol

from deepseek_triton.gateway.protection.keys.api_key import ApiKey

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


class KeyStoreError(Exception):
    """The keys can't be read or written now."""


class KeyStore(Protocol):
    """Keys by their id. Every method but `close` raises `KeyStoreError`."""

    async def find(self, key_id: str) -> ApiKey | None:
        """The key with this id; it sees within a second what another process has changed."""
        ...

    async def all(self) -> tuple[ApiKey, ...]:
        """All keys, revoked ones among them, the oldest first."""
        ...

    async def add(self, key: ApiKey) -> None:
        """Keep one more."""
        ...

    async def replace(self, key: ApiKey) -> None:
        """Keep `key` instead of the one with its id."""
        ...

    async def close(self) -> None:
        """Release the connections."""
        ...


def open_store(place: str) -> KeyStore:
    """The store at `place`: a path, or the URL of a Redis."""
    if place.startswith(REDIS_SCHEMES):
        from deepseek_triton.gateway.protection.keys.redis_store import RedisKeys

        return RedisKeys(place)
    from deepseek_triton.gateway.protection.keys.file_store import FileKeys

    return FileKeys(place)
