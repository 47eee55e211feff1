"""Affinity: conversations stay, dead servers' ones move and come back, and nobody gets too much."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from deepseek_triton.clients import GenerateRequest, Message
from deepseek_triton.gateway.backend.routing.affinity import BOUND, affinity_key, choose

KEYS = [f"key {index}".encode() for index in range(600)]


@dataclass
class Loaded:
    address: str
    running: int = 0


def servers(*names: str) -> list[Loaded]:
    return [Loaded(name) for name in names]


def placed(names: str) -> dict[bytes, str]:
    return {key: choose(servers(*names), key).address for key in KEYS}


def test_stale_hash_ring() -> None:
    """A dead server's keys are spread over the others, no other key moves, and they come back with it."""
    before, without = placed("abc"), placed("ac")
    assert set(without.values()) == {"a", "c"}
    assert all(without[key] == name for key, name in before.items() if name != "b")
    moved = Counter(without[key] for key, name in before.items() if name == "b")
    assert min(moved.values()) > sum(moved.values()) / 4
    assert placed("cab") == before, "the order of the list doesn't matter"
    assert min(Counter(before.values()).values()) > len(KEYS) / 5


def test_loads_are_bounded() -> None:
    all_servers = servers("a", "b", "c", "d")
    for count in range(1, 401):
        choose(all_servers, b"one hot prefix").running += 1
        assert max(server.running for server in all_servers) <= BOUND * (count + 1) / 4 + 1
    assert choose(servers("a", "b"), None).running == 0
    assert choose([Loaded("a", 3), Loaded("b", 2)], None).address == "b"


def chat(*turns: tuple[str, str], **options: Any) -> GenerateRequest:
    return GenerateRequest(messages=[Message(role, text) for role, text in turns], **options)


def test_turns_of_one_conversation_have_one_key() -> None:
    first = chat(("system", "Be short."), ("user", "Hello"))
    later = chat(("system", "Be short."), ("user", "Hello"), ("assistant", "Hi"), ("user", "More"), temperature=0.5)
    other = chat(("system", "Be short."), ("user", "Bye"))
    assert affinity_key("m", first, 512) == affinity_key("m", later, 512) != affinity_key("m", other, 512)
    assert affinity_key("m", first, 512) != affinity_key("n", first, 512)
    assert affinity_key("m", first, 0) is None
    long = "The same long beginning. " * 40
    assert affinity_key("m", GenerateRequest(prompt=long + "a"), 512) == affinity_key(
        "m", GenerateRequest(prompt=long + "b"), 512
    )
