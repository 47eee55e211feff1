"""Connections to a Redis: few, and none that is waited for long."""

from __future__ import annotations

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError

TIMEOUT_S = 2.0
PAUSE_S = 0.05  # before a command is sent again
MAX_CONNECTIONS = 32
ERRORS = (RedisError, OSError)


def connection_pool(url: str, num_retries: int = 0) -> BlockingConnectionPool:
    """A pool of connections to the Redis at `url`; its user closes it.

    num_retries: how often a command is sent again whose connection broke: Redis may have done it the first time.
    """
    return BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=TIMEOUT_S,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(ConstantBackoff(PAUSE_S), num_retries),
    )
