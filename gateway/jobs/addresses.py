"""Addresses that a webhook may go to: hosts of the configured list, at public addresses alone."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from deepseek_triton.gateway.backend.addresses import Resolve
from deepseek_triton.gateway.jobs.job import WebhookRefusedError

PORTS = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """Whether an address is one of the Internet's: not private, loopback, link-local, multicast or reserved."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        for inner in (found.ipv4_mapped, found.sixtofour, found.teredo[1] if found.teredo else None, _nat64(found)):
            if inner is not None:
                return is_public(str(inner))
        if found.is_site_local:
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def check_url(url: str, hosts: Sequence[str]) -> None:
    """Raise `WebhookRefusedError` unless `url` is http(s) and its host is on the list."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise WebhookRefusedError("it is no valid URL") from None
    if parts.scheme not in PORTS or not parts.hostname or port == 0:
        raise WebhookRefusedError("it must be an http or https URL")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise WebhookRefusedError("it must have neither a user nor a fragment")
    if not hosts:
        raise WebhookRefusedError("this gateway has no webhooks (--webhook-host)")
    if parts.hostname.lower() not in {host.lower() for host in hosts}:
        raise WebhookRefusedError("its host is not on the gateway's list (--webhook-host)")


async def public_address(url: str, hosts: Sequence[str], look_up: Resolve) -> str:
    """The address to connect to, so that no second look-up gives another. Raises `WebhookRefusedError`, `OSError`."""
    check_url(url, hosts)
    parts = urlsplit(url)
    assert parts.hostname is not None
    addresses = await look_up(parts.hostname, parts.port or PORTS[parts.scheme])
    if not addresses or not all(map(is_public, addresses)):
        raise WebhookRefusedError("its host has an address that is not public")
    return addresses[0]


def _nat64(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    is_translated = address in ipaddress.ip_network("64:ff9b::/96")
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if is_translated else None
