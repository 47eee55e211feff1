"""The gateway's memory doesn't grow with its requests; benchmarks/gateway/memory.py measures 100,000 of them."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.gateway.memory import growth_mib, load
from benchmarks.gateway.process import app_process


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    with app_process("benchmarks.gateway.memory:EchoBackend", tokens_per_minute=10**12) as gateway:
        points = asyncio.run(load(gateway, 3200))
    # A kibibyte more for each request would be 3 MiB; 16 connections' buffers and caches are less.
    assert growth_mib(points) < 3
