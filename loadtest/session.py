"""One run of a profile: the clients, the clock, and the measurements of generator and server.

It runs under gevent (loadtest/gevent_patch.py), and Locust's users call it. It decides when the next turn of a
conversation is due; others decide when conversations begin, and evaluate the samples.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from typing import Any

import gevent
import httpx

from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.report import report_engine
from deepseek_triton.loadtest.arrivals import poisson
from deepseek_triton.loadtest.exchange import Recorder, exchange
from deepseek_triton.loadtest.metrics import Reading, parse
from deepseek_triton.loadtest.openai_client import OpenAiClient
from deepseek_triton.loadtest.profile import LoadProfile, ProtocolName
from deepseek_triton.loadtest.prompts import History, Talk, talk
from deepseek_triton.loadtest.target import ServerUnderTest
from deepseek_triton.loadtest.usage import Usage, Watch, local_port
from deepseek_triton.loadtest.validity import Observed

LAG_POLL_S = 0.1
READING_S = 1.0
MAX_READINGS = 900  # bounds the memory of a long run: a reading is about 20 kB of text until the run's end
# An engine publishes its metrics four times a second: the last reading waits until they include the last answer.
PUBLISHED_S = 0.6
READING_TIMEOUT_S = 2.0
# Seconds from the start until the first request may be due: Locust creates its users in this time.
LEAD_IN_S = 1.0

_logger = logging.getLogger(__name__)


class Session:
    """The state of one run. `start` begins it and `finish` ends it; everything else is called in between."""

    def __init__(self, profile: LoadProfile, target: ServerUnderTest, *, may_be_shared: bool = False) -> None:
        self.profile, self.target, self._may_be_shared = profile, target, may_be_shared
        self._port = local_port(target.grpc_url)
        # All users share one client for each of gRPC and HTTP, as the users of a gateway would.
        by_family: dict[str, BaseClient | OpenAiClient] = {}
        for name in profile.protocols:
            family = name.split("-")[0]
            by_family.setdefault(family, target.client(name, profile.timeout_s))  # type: ignore[arg-type]
        self._clients = {name: by_family[name.split("-")[0]] for name in profile.protocols}
        if profile.requests.form == "report":  # its ensemble shares another model's engine
            for client in by_family.values():
                client.engine = report_engine(target.model)  # type: ignore[union-attr]
        self.schedule = poisson(profile) if profile.arrivals == "open" else None
        self._http = httpx.Client(timeout=READING_TIMEOUT_S, trust_env=False)
        self._reset()

    def _reset(self) -> None:
        self.recorder = Recorder()
        self.is_started = False
        self.is_stopping = False  # Locust ends the run: the time is up, or somebody stopped it
        self.num_bugs = 0
        self._numbers = itertools.count()
        self._num_first_sent = 0
        self._lags_s: list[float] = []
        self._usage: list[Usage] = []
        self._texts: list[tuple[float, str]] = []  # time of each reading, and the text of /metrics
        self._num_missed = 0
        self._watchers: list[Any] = []

    def start(self) -> None:
        """Start the clock and the watchers."""
        self._reset()
        self._watch = Watch(self._port, local_port(self.target.gateway_url))
        self.recorder.origin = time.perf_counter() + LEAD_IN_S + self.profile.warmup_s
        self.is_started = True
        self._read()
        self._watchers = [gevent.spawn(self._watch_lag), gevent.spawn(self._keep_reading)]

    def finish(self) -> Observed:
        """Stop the watchers; returns all observations."""
        gevent.killall(self._watchers)
        gevent.sleep(PUBLISHED_S)
        self._read()
        self.is_started = False  # Locust's page may start it again
        readings = self._parse()
        return Observed(
            samples=tuple(self.recorder.samples),
            tokens=dict(self.recorder.tokens),
            num_scheduled=None if self.schedule is None else len(self.schedule),
            num_first_sent=self._num_first_sent,
            num_begun=self.recorder.num_begun,
            num_bugs=self.num_bugs,
            lags_s=tuple(self._lags_s),
            usage=tuple(self._usage),
            cores=os.cpu_count() or 1,  # of the whole machine, because the usage is
            is_server_here=self._port is not None,
            may_be_shared=self._may_be_shared,
            readings=readings,
            num_missed_readings=self._num_missed,
            model=self.target.model,
        )

    def close(self) -> None:
        """Release the connections."""
        for client in set(self._clients.values()):
            client.close()
        self._http.close()

    def trouble(self) -> str:
        """Why the model isn't ready over every protocol of the profile, in one line; empty: it is."""
        for client in set(self._clients.values()):
            if isinstance(client, OpenAiClient):
                if told := client.trouble():
                    return told
            elif not client.is_ready():
                target = self.target
                return f"no ready model {target.model!r} at {target.http_url} and {target.grpc_url}"
        return ""

    @property
    def is_over(self) -> bool:
        """Whether the run is over: no request may be sent."""
        return self.is_stopping or self.recorder.now() >= self.profile.duration_s

    def next_talk(self) -> Talk:
        """The next conversation of the profile."""
        return talk(self.profile, next(self._numbers))

    def sleep_until(self, due_s: float) -> None:
        """Wait until `due_s` of the run's clock; returns at once if that has passed."""
        gevent.sleep(max(due_s - self.recorder.now(), 0))

    def converse(self, talk: Talk, protocol: ProtocolName, due_s: float, environment: Any) -> None:
        """Send each turn of a conversation when it is due, until the conversation or the run is over."""
        history = History(talk, self.profile.requests, self.profile.seed)
        for turn in talk.turns:
            due_s += turn.think_s
            if due_s >= self.profile.duration_s:
                return
            self.sleep_until(due_s)
            request = history.request(turn)
            if request is None or self.is_stopping:
                return
            self._num_first_sent += turn is talk.turns[0]
            sample, answer = exchange(self._clients[protocol], request, protocol, due_s, self.recorder)
            _tell_locust(environment, sample, answer)
            if answer is None:
                return
            history.answered(answer)
            due_s = sample.end_s

    def _watch_lag(self) -> None:
        while True:
            before = time.perf_counter()
            gevent.sleep(LAG_POLL_S)
            self._lags_s.append(time.perf_counter() - before - LAG_POLL_S)

    def _keep_reading(self) -> None:
        interval_s = max(READING_S, self.profile.duration_s / MAX_READINGS)
        due_s = self.recorder.now()
        while True:
            due_s = max(due_s + interval_s, self.recorder.now())
            self.sleep_until(due_s)
            self._read()

    def _read(self) -> None:
        self._usage.append(self._watch.read(self.recorder.now()))
        try:
            response = self._http.get(self.target.metrics_url)
            response.raise_for_status()
            self._texts.append((self.recorder.now(), response.text))
        except httpx.HTTPError as error:
            self._miss(error)

    def _parse(self) -> tuple[Reading, ...]:
        """Parse the texts of /metrics. This happens after the run, because parsing would delay requests."""
        readings = []
        for at_s, text in self._texts:
            try:
                readings.append(parse(text, at_s))
            except ValueError as error:
                self._miss(error)
        return tuple(readings)

    def _miss(self, error: Exception) -> None:
        self._num_missed += 1
        _logger.info("no counters from %s: %s", self.target.metrics_url, error)


def _tell_locust(environment: Any, sample: Any, answer: Any) -> None:
    """Locust's own page shows the whole answer and, for streams, the time to first token."""
    length = len(answer.text.encode()) if answer else 0
    error = None if answer else sample.error or f"the answer ended with {sample.finish_reason!r}"
    fire = environment.events.request.fire
    fire(
        request_type=sample.protocol,
        name="whole answer",
        response_time=sample.latency_s * 1e3,
        response_length=length,
        exception=error,
        context={},
    )
    if sample.first_token_s is not None:
        fire(
            request_type=sample.protocol,
            name="time to first token",
            response_time=sample.first_token_s * 1e3,
            response_length=0,
            exception=None,
            context={},
        )
