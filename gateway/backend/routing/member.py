"""Member: one of several servers, and what the gateway knows of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from deepseek_triton.clients import ClientError, ServedModel, ServerUnavailable
from deepseek_triton.gateway.backend.base import Backend, UnknownModelError
from deepseek_triton.gateway.backend.routing.breaker import Breaker, BreakerSettings, Permit
from deepseek_triton.gateway.backend.verdict import Verdict, verdict_of
from deepseek_triton.gateway.observe.routing_metrics import DEGRADATIONS, RoutingMetrics

log = logging.getLogger(__name__)


class Server(Backend, Protocol):
    """A `Backend` that is one server, whose connections may hang."""

    def break_off(self, *, only_waiting: bool) -> None:
        """End what runs with `ServerUnavailable`; only_waiting: what no part of an answer has come for yet."""
        ...

    def reconnect(self) -> None:
        """Send new requests over new connections, for which the address is resolved again."""
        ...


@dataclass
class Member:
    """One server.

    is_up: it answers probes. is_suspect: a request has lost it since the last probe. models: those that it had then;
    known: those that it has ever had. index_error: why it doesn't name its models. running: requests of this process.
    """

    address: str
    server: Server
    settings: BreakerSettings
    metrics: RoutingMetrics
    is_up: bool = False
    is_suspect: bool = False
    models: Mapping[str, ServedModel] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    index_error: ClientError | None = None
    running: int = 0
    _breakers: dict[str, Breaker] = field(default_factory=dict)

    def breaker(self, model: str) -> Breaker:
        """That of one model here."""
        if model not in self._breakers:
            gauge = self.metrics.breaker_open.labels(self.address, model)
            opened = self.metrics.breaker_opened.labels(self.address, model)
            gauge.set(0)

            def tell(state: str) -> None:
                gauge.set(0 if state == "closed" else 1)
                if state == "open":
                    opened.inc()

            self._breakers[model] = Breaker(f"{model} at {self.address}", self.settings, tell=tell)
        return self._breakers[model]

    def found(self, models: tuple[ServedModel, ...], index_error: ClientError | None = None) -> None:
        """A probe was answered."""
        if not self.is_up:
            log.info("the server at %s answers", self.address)
            for breaker in self._breakers.values():
                breaker.try_now()
        self.is_up, self.is_suspect, self.index_error = True, False, index_error
        self.models = {model.name: model for model in models}
        for name in self.models.keys() - self.known:
            self.known.add(name)
            self.breaker(name)  # it and the retries have a series from the beginning
            self.metrics.backend_retries.labels(self.address, name)
            self.metrics.shed.labels(name)
            for how in DEGRADATIONS:
                self.metrics.degraded.labels(name, how)
        self.metrics.backend_up.labels(self.address).set(1)

    def lost(self, why: object) -> None:
        """Probes aren't answered."""
        if self.is_up or not self.known:
            log.warning("the server at %s doesn't answer: %s", self.address, why)
        self.is_up = False
        self.metrics.backend_up.labels(self.address).set(0)

    def forgotten(self) -> None:
        """It is no server of this gateway any more."""
        self.metrics.forget(self.address, self._breakers)

    @contextlib.contextmanager
    def request(self, model: str) -> Iterator[Permit]:
        """One request of `model`, which the breaker has allowed; its end is counted."""
        permit = self.breaker(model).take()
        live = self.metrics.backend_live.labels(self.address)
        verdict: Verdict = "answered"
        self.running += 1
        live.inc()
        try:
            yield permit
        except UnknownModelError:
            verdict = "invalid"
            raise
        except BaseException as error:
            verdict = verdict_of(error)
            self.is_suspect |= isinstance(error, ServerUnavailable)
            raise
        finally:
            self.running -= 1
            live.dec()
            permit.ended(verdict)
            self.metrics.backend_requests.labels(self.address, model, verdict).inc()
