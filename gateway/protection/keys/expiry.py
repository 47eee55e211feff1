"""Tells the gateway's metrics when the next API key expires."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable

from prometheus_client import Gauge

from deepseek_triton.gateway.protection.keys.api_key import ApiKey
from deepseek_triton.gateway.protection.keys.store import KeyStoreError, open_store

log = logging.getLogger(__name__)

LOOK_S = 30.0


async def watch_expiry(place: str, gauge: Gauge, pause_s: float = LOOK_S) -> None:
    """Set `gauge` to when the next key at `place` expires, in Unix time, every `pause_s` seconds until cancelled."""
    store = open_store(place)
    try:
        while True:
            try:
                gauge.set(next_expiry(await store.all()))
            except KeyStoreError as error:
                log.warning("when the next key expires isn't known: %s", error)
            await asyncio.sleep(pause_s)
    finally:
        await store.close()


def next_expiry(keys: Iterable[ApiKey]) -> float:
    """When the first of the valid keys expires, in Unix time; infinity: none does."""
    return min((key.expires_at for key in keys if key.is_valid), default=math.inf)
