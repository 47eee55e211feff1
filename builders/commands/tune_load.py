"""One measurement of `deepseek-triton tune`: serve a configuration, load it with clients, return their latencies.

TuneLoad is closed-loop: a client asks again when it has its answer.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.builders.repository.check import CheckError
from deepseek_triton.builders.repository.check_scoring import is_scoring
from deepseek_triton.builders.tune.measurement import Measurement
from deepseek_triton.builders.tune.options import TuneError
from deepseek_triton.builders.tune.repository import copied
from deepseek_triton.builders.tune.space import Configs
from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.errors import ClientError
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.clients.score import ScoreRequest
from deepseek_triton.ensemble.protocol.pipelines import ENGINE_SUFFIX, model_name
from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer
from deepseek_triton.ensemble.text.errors import one_line

DEFAULT_TEXTS = Path(__file__).parents[1] / "fp8" / "texts" / "data" / "english.txt"
PASSAGE_WORDS = 40
REQUEST_TIMEOUT_S = 60.0
DECIMALS = 2  # of a millisecond
WARM_UP_SHARE = 0.2  # of a measurement's seconds, on top of them

Ask = Callable[[BaseClient, str], Any]


@dataclass(frozen=True)
class TuneLoad:
    """The load for one measurement: `clients` ask at the same time, measured for `seconds` after a warm-up."""

    texts: Sequence[str]
    clients: int
    seconds: float
    ask: Ask

    @property
    def seconds_in_all(self) -> float:
        """Seconds of a measurement with its warm-up, without the server's start."""
        return self.seconds * (1 + WARM_UP_SHARE)


def read_texts(path: Path | None) -> list[str]:
    """The texts that clients send: each line of a file; without a file, passages that all begin differently.

    A generator reuses the cached prefix of an earlier prompt, so prompts that repeat would measure that reuse.

    Raises:
        TuneError: the file can't be read, or holds none.
    """
    file = path or DEFAULT_TEXTS
    try:
        whole = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TuneError(f"texts {file} can't be read: {error}") from error
    if path is None:
        words = whole.split()
        # The stride has no common divisor with their number: neighbours in the list are far apart in the text.
        starts = [i * 101 % len(words) for i in range(len(words))]
        return [" ".join(words[i : i + PASSAGE_WORDS]) for i in starts if i + PASSAGE_WORDS <= len(words)]
    texts = [line.strip() for line in whole.splitlines() if line.strip()]
    if not texts:
        raise TuneError(f"texts {file} holds no text: write one on each line")
    return texts


def asker(name: str, configs: Configs, labels: tuple[str, ...], max_tokens: int) -> Ask:
    """A function that sends one request to model `name`.

    Raises:
        TuneError: labels for a model that generates.
    """
    if is_scoring(configs[model_name(name, ENGINE_SUFFIX)]):
        return lambda client, text: client.score(ScoreRequest(texts=[text], labels=labels or None))
    if labels:
        raise TuneError(f"labels are for scoring models, {name} generates")
    return lambda client, text: client.generate(GenerateRequest(prompt=text, max_tokens=max_tokens))


def measure(repository: Path, name: str, configs: Configs, load: TuneLoad) -> Measurement:
    """Serve model `name` with these configurations and load it; configurations that can't be served give a failure.

    Raises:
        TuneError: this machine is at fault, not the configurations.
    """
    try:
        with (
            copied(repository, configs) as copy,
            TritonServer(copy, http_port=0, grpc_port=0, metrics_port=0) as server,
        ):
            return run(load, server.grpc_url, name)
    except (CheckError, ServerError) as error:
        return Measurement(failure=one_line(error))
    except OSError as error:
        raise TuneError(f"{error.filename or 'temporary files'}: {error.strerror}; mend it, then go on") from error


def run(load: TuneLoad, url: str, model: str) -> Measurement:
    """Run the clients, and return the latencies of the answers that come after the warm-up."""
    start = time.perf_counter()
    counted_from, end = start + load.seconds_in_all - load.seconds, start + load.seconds_in_all
    latencies: list[float] = []
    lock, is_over = threading.Lock(), threading.Event()

    def ask(number: int, client: BaseClient) -> str:
        index = number
        while (began := time.perf_counter()) < end and not is_over.is_set():
            try:
                load.ask(client, load.texts[index % len(load.texts)])
            except ClientError as error:
                is_over.set()
                return one_line(error)
            index += load.clients
            finished = time.perf_counter()
            # Answers count by their ends: counting those that also began here would leave out the slow ones.
            if counted_from <= finished <= end:
                with lock:
                    latencies.append(round((finished - began) * 1e3, DECIMALS))
        return ""

    with ThreadPoolExecutor(load.clients) as pool, contextlib.ExitStack() as stack:
        # This runs before the pool waits for its threads, so an interrupt ends what they wait for.
        stack.callback(is_over.set)
        clients = [stack.enter_context(GrpcClient(url, model, REQUEST_TIMEOUT_S)) for _ in range(load.clients)]
        failure = next((told for told in pool.map(ask, range(load.clients), clients) if told), "")
    if not failure and not latencies:
        failure = f"no request was answered within {load.seconds:g} s"
    return Measurement(failure=failure) if failure else Measurement(tuple(latencies), load.seconds)
