"""Pool: several servers as one `Backend`. A request that fails before its answer has begun is sent to another one.

Servers may come and go: one that isn't found any more gets no new request, and is closed when the last has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from deepseek_triton.clients import (
    Chunk,
    ClientError,
    Embedding,
    GenerateRequest,
    Generation,
    Score,
    ScoreRequest,
    ServedModel,
    ServerUnavailable,
)
from deepseek_triton.gateway.backend.base import NoBackendError, UnknownModelError, UpstreamCall
from deepseek_triton.gateway.backend.roster import Discovery, Roster
from deepseek_triton.gateway.backend.routing.affinity import affinity_key, choose
from deepseek_triton.gateway.backend.routing.breaker import BreakerSettings
from deepseek_triton.gateway.backend.routing.member import Member, Server
from deepseek_triton.gateway.backend.routing.prober import Prober
from deepseek_triton.gateway.backend.verdict import may_be_retried
from deepseek_triton.gateway.backend.watched_file import WatchedFile
from deepseek_triton.gateway.observe.routing_metrics import RoutingMetrics
from deepseek_triton.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Pool:
    """A `Backend`. servers: address → server; the models of the settings must be on one of them each.

    discovery: with it servers come and go, looked for every `probe_interval_s`; `servers` are among those found.
    """

    def __init__(
        self,
        servers: Mapping[str, Server],
        settings: GatewaySettings,
        metrics: RoutingMetrics,
        discovery: Discovery | None = None,
    ) -> None:
        self._breaker = BreakerSettings(settings.breaker_failures, settings.breaker_open_s, settings.breaker_trials)
        self._settings, self._metrics = settings, metrics
        self._drained = WatchedFile[frozenset[str]](settings.drained, lambda text: frozenset(text.split()), frozenset())
        self.members = [self._member(address, server) for address, server in servers.items()]
        self._prober = Prober(
            self.members, settings.probe_interval_s, settings.probe_timeout_s, settings.hang_s, probed=self._is_drained
        )
        self._roster: Roster | None = None
        if discovery is not None:
            interval_s = settings.probe_interval_s
            self._roster = Roster(self.members, self._prober, discovery, self._member, interval_s)

    async def open(self) -> None:
        """Look which servers are there; one that isn't is no error."""
        await asyncio.gather(*(member.server.open() for member in self.members))
        await self._prober.start()
        if self._roster is not None:
            await self._roster.start()
        for member in self.members:
            if member.index_error is not None:
                log.warning("the models at %s are not known: %s", member.address, member.index_error)

    async def close(self) -> None:
        """Release the connections; requests that are being given up are waited for."""
        if self._roster is not None:
            await self._roster.stop()
        await self._prober.stop()
        await asyncio.gather(*(member.server.close() for member in self.members))

    def _member(self, address: str, server: Server) -> Member:
        return Member(address, server, self._breaker, self._metrics)

    def _is_drained(self, member: Member) -> bool:
        """Whether it gets no new requests; the gauge says so from the first request or probe on that heeds it."""
        is_drained = member.address in self._drained.current()
        self._metrics.backend_drained.labels(member.address).set(is_drained)
        return is_drained

    async def is_ready(self) -> bool:
        """Say whether servers are there that have every model that is to be served."""
        served = {name for member in self.members if member.is_up for name in member.models}
        return bool(served) and served >= set(self._settings.models)

    async def models(self) -> tuple[ServedModel, ...]:
        """The models of the servers that are there."""
        up = [member for member in self.members if member.is_up]
        if not up:
            raise NoBackendError("no server answers")
        served = {name: model for member in up for name, model in member.models.items()}
        if not served and up[0].index_error is not None:
            raise up[0].index_error
        return tuple(served[name] for name in sorted(served))

    async def check_model(self, name: str) -> None:
        """Raise `UnknownModelError` unless a model of this name generates text."""
        tries = _Tries(self, name)
        while True:
            member = await tries.next(asks_breakers=False)
            try:
                return await member.server.check_model(name)
            except Exception as error:
                tries.failed(member, error)

    async def generate(self, model: str, request: GenerateRequest, call: UpstreamCall) -> tuple[Generation, ...]:
        """Wait for all answers, in the order of their index."""
        key = affinity_key(model, request, self._settings.affinity_bytes)
        return await self._ask(model, key, lambda server: server.generate(model, request, call))

    def stream(self, model: str, request: GenerateRequest, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        """Give the answers as they come; once a part has come, no other server is asked."""
        key = affinity_key(model, request, self._settings.affinity_bytes)
        return self._stream(model, key, lambda server: server.stream(model, request, call))

    def report(self, model: str, image: bytes, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        """Give the report on an image as it comes; once a part has come, no other server is asked."""
        return self._stream(model, None, lambda server: server.report(model, image, call))

    async def _stream(
        self, model: str, key: bytes | None, ask: Callable[[Server], AsyncGenerator[Chunk, None]]
    ) -> AsyncGenerator[Chunk, None]:
        tries = _Tries(self, model, key)
        is_begun = False
        while True:
            member = await tries.next()
            try:
                with member.request(model) as permit:
                    async with contextlib.aclosing(ask(member.server)) as chunks:
                        async for chunk in chunks:
                            if not is_begun:
                                is_begun = True
                                permit.works()
                            yield chunk
                return
            except Exception as error:
                tries.failed(member, error, is_last=is_begun)

    async def score(self, model: str, request: ScoreRequest, call: UpstreamCall) -> tuple[Score, ...]:
        """Score every text of the request."""
        return await self._ask(model, None, lambda server: server.score(model, request, call))

    async def embed(self, model: str, texts: Sequence[str], call: UpstreamCall) -> tuple[Embedding, ...]:
        """Embed every text."""
        return await self._ask(model, None, lambda server: server.embed(model, texts, call))

    async def max_seq_len(self, model: str) -> int:
        """The tokens that a prompt and its answer may have together; not for scoring models."""
        tries = _Tries(self, model)
        while True:
            member = await tries.next(asks_breakers=False)
            try:
                return await member.server.max_seq_len(model)
            except Exception as error:
                tries.failed(member, error)

    async def _ask(self, model: str, key: bytes | None, ask: Callable[[Server], Awaitable[Answer]]) -> Answer:
        """One server's whole answer."""
        tries = _Tries(self, model, key)
        while True:
            member = await tries.next()
            try:
                with member.request(model):
                    return await ask(member.server)
            except Exception as error:
                tries.failed(member, error)

    def num_available(self, model: str) -> int:
        """The number of servers that may take requests of `model` now."""
        return sum(member.breaker(model).state == "closed" for member in self.members if self._has(member, model))

    async def candidates(self, model: str) -> list[Member]:
        """The servers that have `model`, whatever their breakers say. Raises `ClientError`, `UnknownModelError`."""
        if not any(self._has(member, model) for member in self.members):
            await self._prober.look_again()
        there = [member for member in self.members if self._has(member, model)]
        if there:
            left = [member for member in there if not self._is_drained(member)]
            if not left:
                raise NoBackendError(f"all servers of the model '{model}' are being drained")
            return left
        up = [member for member in self.members if member.is_up]
        is_known = model in self._settings.models or any(model in member.known for member in self.members)
        if not up or (is_known and len(up) < len(self.members)):
            raise NoBackendError(f"no server that has the model '{model}' answers")
        for member in up:
            if member.index_error is not None:
                raise member.index_error
        raise UnknownModelError(f"the model '{model}' does not exist")

    def retried(self, member: Member, model: str, error: Exception) -> None:
        """A request goes to another server now."""
        self._metrics.backend_retries.labels(member.address, model).inc()
        log.info("a request of %s is sent elsewhere: %s: %s", model, member.address, error)

    def may_be_lost(self, member: Member) -> None:
        """A request has lost its connection."""
        self._prober.kick(member)

    @property
    def max_retries(self) -> int:
        """For each request."""
        return self._settings.max_retries

    @staticmethod
    def _has(member: Member, model: str) -> bool:
        return member.is_up and model in member.models


@dataclass
class _Choice:
    """A server that one request was sent to, and how that ended."""

    member: Member
    error: Exception


class _Tries:
    """The servers that one request was sent to so far, and the next one."""

    def __init__(self, pool: Pool, model: str, key: bytes | None = None) -> None:
        self._pool, self._model, self._key = pool, model, key
        self._failed: list[_Choice] = []

    async def next(self, *, asks_breakers: bool = True) -> Member:
        """The server to ask. Raises the first one's error where no other is left; `NoBackendError`.

        asks_breakers: whether they are asked.
        """
        try:
            there = await self._pool.candidates(self._model)
        except (ClientError, UnknownModelError):
            if self._failed:
                raise self._failed[0].error from None
            raise
        tried = [choice.member for choice in self._failed]
        waits = {member.address: member.breaker(self._model).wait_s() if asks_breakers else 0.0 for member in there}
        open_to = [member for member in there if member not in tried and not waits[member.address]]
        if not open_to:
            if self._failed:
                raise self._failed[0].error
            wait_s = min(waits.values())
            raise NoBackendError(f"the servers of the model '{self._model}' fail; retry in {wait_s:.0f} s", wait_s)
        trusted = [member for member in open_to if not member.is_suspect]
        if self._failed:
            last = self._failed[-1]
            self._pool.retried(last.member, self._model, last.error)
        return choose(trusted or open_to, self._key)

    def failed(self, member: Member, error: Exception, *, is_last: bool = False) -> None:
        """A server didn't answer. Raises `error` where no other one may be asked."""
        if isinstance(error, ServerUnavailable):
            self._pool.may_be_lost(member)
        can_go_on = may_be_retried(error) and not is_last and len(self._failed) < self._pool.max_retries
        if not can_go_on:
            raise error
        self._failed.append(_Choice(member, error))
