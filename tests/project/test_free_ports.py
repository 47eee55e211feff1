"""Ports that are free when a server takes them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deepseek_triton import free_ports
from deepseek_triton.free_ports import bind_free_port

LOCAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_ports_differ_and_no_outgoing_connection_gets_them() -> None:
    first, last = (int(word) for word in LOCAL.read_text(encoding="ascii").split())
    ports = free_ports.free_ports(400)
    assert len(set(ports)) == 400
    assert not [port for port in ports if first <= port <= last]
    for port in free_ports.free_ports(2):
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_any_port_where_none_of_those_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as listener:
        port = taken.getsockname()[1]
        monkeypatch.setattr(free_ports, "PORTS", range(port, port + 1))
        bind_free_port(listener, "127.0.0.1")
        assert listener.getsockname()[1] != port


def test_another_machines_address() -> None:
    with pytest.raises(OSError, match="assign"):
        free_ports.free_ports(1, "192.0.2.1")
