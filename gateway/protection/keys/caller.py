"""Caller: on whose account a request is: a key's, or, where no keys are asked for, a network address's."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_triton.gateway.protection.keys.api_key import ApiKey
from deepseek_triton.gateway.record import Scope
from deepseek_triton.gateway.settings import GatewaySettings

_KEY = "gateway.caller"


@dataclass(frozen=True)
class Caller:
    """Who calls, and what it may; 0: no limit.

    id: a key's id, or an address. max_running: requests at one time. is_collected: False: its answers never are.
    """

    id: str
    requests_per_minute: int
    tokens_per_minute: int
    max_running: int
    is_collected: bool = True

    @classmethod
    def of_key(cls, key: ApiKey, settings: GatewaySettings) -> Caller:
        """The one who has `key`."""
        return cls(
            key.id,
            _first(key.requests_per_minute, settings.requests_per_minute),
            _first(key.tokens_per_minute, settings.tokens_per_minute),
            _first(key.max_running, settings.max_running_per_key),
            key.is_collected is not False,
        )

    @classmethod
    def of_address(cls, scope: Scope, settings: GatewaySettings) -> Caller:
        """The one who calls from the network address in `scope`."""
        address = scope["client"][0] if scope.get("client") else "unknown"
        return cls(address, settings.requests_per_minute, settings.tokens_per_minute, settings.max_running_per_key)


def set_caller(scope: Scope, caller: Caller) -> None:
    """Note who sends the request."""
    scope[_KEY] = caller


def caller_of(scope: Scope) -> Caller | None:
    """Who sends the request; None: its path is open to all."""
    caller = scope.get(_KEY)
    assert caller is None or isinstance(caller, Caller)
    return caller


def _first(own: int | None, common: int) -> int:
    return common if own is None else own
