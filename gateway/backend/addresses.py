"""The servers' addresses: those of the settings, and all that DNS has for a name, as of a headless service."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

DNS = "dns:"  # before HOST:PORT: each address of HOST is a server
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # host, port → addresses


async def resolve(host: str, port: int) -> list[str]:
    """The addresses that DNS gives. Raises `OSError`."""
    try:
        rows = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # an empty label, or one of over 63 characters
        raise OSError(f"{host!r} is no host's name: {error}") from error
    return [str(row[4][0]) for row in rows]


def check_backend_url(url: str) -> None:
    """Raise `ValueError` for `dns:` without a host and a port."""
    host, _, port = url.removeprefix(DNS).rpartition(":")
    if url.startswith(DNS) and not (host and port.isdecimal()):
        raise ValueError(f"--backend-url {url!r} must be host:port, or dns:host:port")


async def addresses_of(urls: Iterable[str], look_up: Resolve) -> tuple[str, ...]:
    """Each server's address once, names resolved. Raises `OSError`: DNS doesn't answer, or has nothing for a name."""
    found: list[str] = []
    for url in urls:
        if not url.startswith(DNS):
            found.append(url)
            continue
        host, _, port = url.removeprefix(DNS).rpartition(":")
        found += sorted(_joined(address, port) for address in await look_up(host, int(port)))
    return tuple(dict.fromkeys(found))


def _joined(address: str, port: str) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
