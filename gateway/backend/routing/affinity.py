"""Which of several servers gets a request: the one that has its conversation's beginning, unless it is too busy.

Servers are ranked for each key by a hash of both (rendezvous hashing). It has no ring that could be stale: a server
that is gone leaves every other key where it was, and gets its own back when it returns. Loads are bounded: a server
that has more than its share of what runs is passed over (consistent hashing with bounded loads).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

from deepseek_triton.clients import GenerateRequest, Message

BOUND = 1.25  # a server may have this many times the mean load


class Loaded(Protocol):
    """A server. address: its name for the hash; running: requests that it has now."""

    @property
    def address(self) -> str: ...

    @property
    def running(self) -> int: ...


AnyLoaded = TypeVar("AnyLoaded", bound=Loaded)


def affinity_key(model: str, request: GenerateRequest, num_bytes: int) -> bytes | None:
    """The beginning of a conversation, which all its turns share; None: it has none.

    Of messages, those up to the user's first one count: later turns have the same.
    """
    if not num_bytes:
        return None
    begin = (request.prompt or "")[:num_bytes]
    for turn in request.messages or ():
        role, content = (turn.role, turn.content) if isinstance(turn, Message) else (turn["role"], turn.get("content"))
        begin += f"{role}\0{str(content)[:num_bytes]}\0"
        if role == "user" or len(begin) > num_bytes:
            break
    text = begin.encode("utf-8", "replace")[:num_bytes]
    return f"{model}\0".encode("utf-8", "replace") + text if text else None


def choose(servers: Sequence[AnyLoaded], key: bytes | None) -> AnyLoaded:
    """One of `servers`, which aren't empty; without a key, one with the least load."""
    if key is None:
        least = min(server.running for server in servers)
        return random.choice([server for server in servers if server.running == least])
    bound = math.ceil(BOUND * (sum(server.running for server in servers) + 1) / len(servers))
    ranked = sorted(servers, key=lambda server: _rank(key, server.address))
    return next(server for server in ranked if server.running < bound)


def _rank(key: bytes, address: str) -> bytes:
    return hashlib.blake2b(key, key=hashlib.blake2b(address.encode(), digest_size=32).digest(), digest_size=8).digest()
