"""`deepseek-triton tune`: the configuration that serves most requests within a latency limit, found by trying.

For each point it starts a server of its own on a copy of the model's parts, loads it with as many clients as asked, and
notes the result in a journal; the winner goes into the repository. Load is closed-loop: a client asks again when it has
its answer.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.check import CheckError
from builders.check_scoring import is_scoring
from builders.options import Report
from builders.tune.journal import Journal
from builders.tune.report import plot, table
from builders.tune.repository import copied, newest_version, put_configs, read_configs
from builders.tune.search import Axis, Measured, Measurement, best_of, search
from builders.tune.space import Configs, Parameter, Point, TuneError, limits_of, read_point, space_of, with_point
from clients.api import GenerateRequest
from clients.base import BaseClient
from clients.errors import ClientError
from clients.grpc import GrpcClient
from clients.score import ScoreRequest
from ensemble.pipelines import ENGINE_SUFFIX, model_name
from ensemble.server import ServerError, TritonServer

DEFAULT_TEXTS = Path(__file__).parents[1] / "data" / "english.txt"
TEXT_CHARS = 240  # of a line; longer ones are cut
REQUEST_TIMEOUT_S = 60.0
WARM_UP_SHARE = 0.2  # of a point's seconds, on top of them


@dataclass(frozen=True)
class TuneOptions:
    """What to tune, and within what.

    p99_ms: the limit of the 99th percentile of a request's latency. clients: asking at once. seconds: measured for
    each point. budget_s: no new point is begun that would end after it. texts: a file, a text a line; None: a built-in
    one. labels: for a scoring model built without. max_tokens: generated for each request. output: directory of
    journal, table and plot. is_dry: the repository stays as it is.
    """

    name: str
    repository: Path
    p99_ms: float
    clients: int = 16
    seconds: float = 10.0
    budget_s: float = 900.0
    texts: Path | None = None
    labels: tuple[str, ...] = ()
    max_tokens: int = 32
    output: Path | None = None
    is_dry: bool = False

    def __post_init__(self) -> None:
        for name in ("p99_ms", "seconds", "budget_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TuneError(f"{name} is {value!r}, must be finite and above 0")
        for name in ("clients", "max_tokens"):
            if getattr(self, name) < 1:
                raise TuneError(f"{name} is {getattr(self, name)}, must be at least 1")

    @property
    def directory(self) -> Path:
        """Where journal, table and plot go."""
        return self.output or Path(f"tune-{self.name}")


@dataclass(frozen=True)
class Tuned:
    """measured: every point. best: the winner, None where nothing is within the limit. changed: files written."""

    measured: list[Measured]
    best: Measured | None
    changed: list[Path]
    is_complete: bool


def tune(options: TuneOptions, report: Report = lambda what, done, total: None) -> Tuned:
    """Search, and write the winner into the repository.

    Raises:
        BuildError: the model, the journal or an option is at fault; the repository is as it was.
    """
    configs = read_configs(options.repository, options.name)
    version_dir = newest_version(options.repository / model_name(options.name, ENGINE_SUFFIX))
    space = space_of(configs, options.name, limits_of(version_dir))
    texts = read_texts(options.texts)
    journal = Journal(options.directory / "journal.jsonl", _subject(options, configs, space, version_dir, texts))
    ask = _asker(options, configs)
    deadline, is_complete = _Deadline(options.budget_s, report), True

    def measure(point: Point) -> Measurement | None:
        nonlocal is_complete
        if (known := journal.get(point)) is not None:
            return known
        if not deadline.leaves_room():
            is_complete = False
            return None
        with deadline.point():
            result = _measure(options, with_point(space, configs, options.name, point), texts, ask)
        journal.add(Measured(dict(point), result))
        return result

    axes = [Axis(parameter.name, parameter.values) for parameter in space]
    measured = search(axes, read_point(space, configs, options.name), measure, options.p99_ms)
    best = best_of(measured, options.p99_ms)
    _save(options, measured, best)
    changed = []
    if best is not None and not options.is_dry:
        changed = put_configs(options.repository, with_point(space, configs, options.name, best.point))
    return Tuned(measured, best, changed, is_complete)


def read_texts(path: Path | None) -> list[str]:
    """What clients send: a text a line.

    Raises:
        TuneError: the file can't be read, or holds none.
    """
    file = path or DEFAULT_TEXTS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TuneError(f"texts {file} can't be read: {error}") from error
    texts = [line.strip()[:TEXT_CHARS] for line in lines if line.strip()]
    if not texts:
        raise TuneError(f"texts {file} holds no text: write one on each line")
    return texts


def load(
    ask: Callable[[BaseClient, str], Any], url: str, model: str, texts: Sequence[str], clients: int, seconds: float
) -> Measurement:
    """Let `clients` ask for `seconds`, after a warm-up that doesn't count."""
    start = time.perf_counter()
    counted_from, end = start + seconds * WARM_UP_SHARE, start + seconds * (1 + WARM_UP_SHARE)
    latencies: list[float] = []
    lock, failed = threading.Lock(), threading.Event()

    def run(number: int) -> str:
        with GrpcClient(url, model, REQUEST_TIMEOUT_S) as client:
            index = number
            while (began := time.perf_counter()) < end and not failed.is_set():
                try:
                    ask(client, texts[index % len(texts)])
                except ClientError as error:
                    failed.set()
                    return " ".join(str(error).split())
                index += clients
                finished = time.perf_counter()
                # By their ends: counting only those that also began here would leave out the slow ones.
                if counted_from <= finished <= end:
                    with lock:
                        latencies.append(finished - began)
        return ""

    with ThreadPoolExecutor(clients) as pool:
        failure = next((told for told in pool.map(run, range(clients)) if told), "")
    if not failure and not latencies:
        failure = f"no request was answered within {seconds:g} s"
    if failure:
        return Measurement(failure=failure)
    ordered = sorted(latencies)
    p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3 for share in (0.5, 0.99))
    return Measurement(len(ordered) / seconds, p50, p99, len(ordered))


def _measure(options: TuneOptions, configs: Configs, texts: Sequence[str], ask: Any) -> Measurement:
    """One point; one that can't be served is a result too."""
    try:
        with (
            copied(options.repository, configs) as repository,
            TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server,
        ):
            return load(ask, server.grpc_url, options.name, texts, options.clients, options.seconds)
    except (CheckError, ServerError) as error:
        return Measurement(failure=" ".join(str(error).split()))


def _asker(options: TuneOptions, configs: Configs) -> Callable[[BaseClient, str], Any]:
    if is_scoring(configs[model_name(options.name, ENGINE_SUFFIX)]):
        labels = options.labels or None
        return lambda client, text: client.score(ScoreRequest(texts=[text], labels=labels))
    if options.labels:
        raise TuneError(f"labels are for scoring models, {options.name} generates")
    return lambda client, text: client.generate(GenerateRequest(prompt=text, max_tokens=options.max_tokens))


def _subject(
    options: TuneOptions, configs: Configs, space: list[Parameter], version_dir: Path, texts: Sequence[str]
) -> dict[str, Any]:
    """What a measurement depends on beside the point: the journal is worth nothing for another."""
    tuned = {parameter.name for parameter in space}
    parameters = configs[model_name(options.name, ENGINE_SUFFIX)].parameters
    return {
        "model": options.name,
        "engine": hashlib.sha256((version_dir / "manifest.json").read_bytes()).hexdigest(),
        "parameters": {name: parameters[name].string_value for name in sorted(parameters) if name not in tuned},
        "cores": len(os.sched_getaffinity(0)),
        "clients": options.clients,
        "seconds": options.seconds,
        "max_tokens": options.max_tokens,
        "labels": list(options.labels),
        "texts": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
    }


def _save(options: TuneOptions, measured: list[Measured], best: Measured | None) -> None:
    try:
        (options.directory / "table.txt").write_text(table(measured, best, options.p99_ms) + "\n", encoding="utf-8")
    except OSError as error:
        raise TuneError(f"{options.directory}: {error.strerror}") from error
    title = f"{options.name}, {options.clients} clients"
    plot(measured, best, options.p99_ms, title, options.directory / "throughput.png")


class _Deadline:
    """The budget, as a progress bar too; a context for each point."""

    def __init__(self, budget_s: float, report: Report) -> None:
        self._start = self._began = time.monotonic()
        self._budget_s, self._report = budget_s, report
        self._longest_s = 0.0

    def leaves_room(self) -> bool:
        """Whether a point as long as the longest would still end in time; the first always may."""
        return time.monotonic() - self._start + self._longest_s <= self._budget_s

    def point(self) -> _Deadline:
        return self

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - self._began)
        self._report("seconds of the budget", min(int(now - self._start), int(self._budget_s)), int(self._budget_s))
