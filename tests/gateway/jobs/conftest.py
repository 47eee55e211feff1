"""A Redis for a module's tests, and a queue in it that begins empty."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from tests.support.redis import redis_server


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    """A client that looks into the Redis, which is empty at first."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        client.flushall()
        yield client
