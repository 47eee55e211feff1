"""An address as people write it → the protocol, and the address as that protocol's client takes it."""

from __future__ import annotations

import re

from deepseek_triton.clients.connect import DEFAULT_URLS, PROTOCOLS, ProtocolName

MAX_PORT = 65535
# What stands before :// → the protocol that it means where none is named.
SCHEMES: dict[str, ProtocolName] = {"grpc": "grpc", "http": "http", "https": "http"}


def read_address(url: str | None, protocol: ProtocolName | None) -> tuple[ProtocolName, str]:
    """Both forms, `host:port` and `scheme://host:port`, are taken for both protocols.

    `protocol` None: the one that the scheme means, else gRPC. `url` None: this machine. A host without a port gets
    tritonserver's own, but for http:// and https:// addresses, which have ports of their own by default.

    Raises `ValueError` for a scheme that is unknown, or that the protocol doesn't have, and for a port that can't be.
    """
    if url is None:
        protocol = protocol or PROTOCOLS[0]
        return protocol, DEFAULT_URLS[protocol]
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    elif scheme not in SCHEMES:
        raise ValueError(f"url must be host:port, or begin with {', '.join(f'{s}://' for s in SCHEMES)}; got {url!r}")
    _check_port(rest)
    if match := re.fullmatch(r"([^/]*(?:/.*?)?)/v\d+(?:/.*)?", rest):
        raise ValueError(f"url must name the server alone, as {url[: len(url) - len(rest)]}{match[1]}; got {url!r}")
    protocol = protocol or (SCHEMES[scheme] if scheme else PROTOCOLS[0])
    if protocol == "http":
        return protocol, url if scheme.startswith("http") else f"http://{_with_port(rest, protocol)}"
    if scheme == "https":
        raise ValueError(f"url must not begin with https:// for gRPC, which is sent in plain text; got {url!r}")
    return protocol, _with_port(rest.rstrip("/"), protocol)


def _check_port(rest: str) -> None:
    """Refuse what stands as a port after a name or an IPv4 address and is none."""
    match = re.fullmatch(r"[^/:@\[\]]+:([^/:@]+)(?:/.*)?", rest)
    if match and not (match[1].isdecimal() and 0 < int(match[1]) <= MAX_PORT):
        raise ValueError(f"the port in --url must be a number from 1 to {MAX_PORT}, got {match[1]!r}")


def _with_port(host: str, protocol: ProtocolName) -> str:
    default = DEFAULT_URLS[protocol].rpartition(":")[2]
    return host if not host or "/" in host or re.search(r":\d*$", host) else f"{host}:{default}"
