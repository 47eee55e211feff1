"""Measure what the gateway adds to the first token, and what it takes of the throughput of 64 streams; beside LiteLLM.

tritonserver serves a runner that takes a fixed time for each step and computes nothing. Requests go straight to it
over gRPC, through the gateway, and, with --litellm, through LiteLLM's proxy before Triton's own HTTP API (it speaks no
gRPC). The ways are taken in turn, round by round.
    python -m benchmarks.gateway.latency [--litellm /path/to/venv/bin/litellm] [--requests 100] [--rounds 3]
writes benchmarks/results/gateway-latency.json; the status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gateway.load import PROMPT, Ask, Timed, over_grpc, over_http, together
from benchmarks.gateway.process import RunningGateway, gateway_process
from benchmarks.machine import describe
from benchmarks.streaming import NAME, ROOT, write_repository
from deepseek_triton.clients import AsyncGrpcClient
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.free_ports import free_ports
from deepseek_triton.gateway.protection.keys.api_key import ApiKey
from deepseek_triton.gateway.protection.keys.store import open_store

RESULTS = ROOT / "benchmarks" / "results"
STREAMS = 64
STEP_S = 0.02
STREAM_TOKENS = 100
ANSWER_TOKENS = 4  # of the requests whose latency is measured
LOAD = 8  # requests at once, of those that are beside LiteLLM's
MAX_ADDED_MS = 3.0
MIN_THROUGHPUT = 0.9
START_S = 120.0


@contextlib.contextmanager
def litellm_proxy(executable: str, triton_url: str, key: str) -> Iterator[RunningGateway]:
    """Run LiteLLM's proxy with one worker before Triton's HTTP API."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.yaml"
        params = {"model": f"triton/{NAME}", "api_base": f"{triton_url}/v2/models/{NAME}/generate", "api_key": "none"}
        config.write_text(json.dumps({"model_list": [{"model_name": NAME, "litellm_params": params}]}))
        command = [executable, "--config", str(config), "--port", str(port), "--host", "127.0.0.1"]
        with (Path(directory) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "LITELLM_MASTER_KEY": key})
        try:
            _wait_for(f"http://127.0.0.1:{port}/health/liveliness", process)
            yield RunningGateway(f"http://127.0.0.1:{port}", process)
        except RuntimeError:
            print((Path(directory) / "log").read_text(encoding="utf-8")[-2000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).is_success:
                return
        time.sleep(0.2)
    raise RuntimeError(f"nothing answers at {url}")


def require_same_text(urls: dict[str, str], key: str) -> None:
    """Whoever is timed gives the same answer. Raises `RuntimeError`."""
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": ANSWER_TOKENS}
    texts = {}
    for name, url in urls.items():
        answer = httpx.post(
            f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=START_S
        )
        texts[name] = answer.json()["choices"][0]["text"] if answer.is_success else answer.text
    if "" in texts.values() or len(set(texts.values())) > 1:
        raise RuntimeError(f"the answers differ: {texts}")


async def first_tokens(ways: dict[str, Ask], num_requests: int) -> dict[str, list[float]]:
    """Milliseconds to the first token of each way, one request at a time, the ways in turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_requests + 5):
        for name, ask in ways.items():
            answer = await ask(ANSWER_TOKENS)
            if number >= 5:
                found[name].append(answer.first_s * 1e3)
    return found


async def throughputs(ways: dict[str, Ask], num_rounds: int) -> dict[str, list[float]]:
    """Tokens/s of 64 streams of each way, the ways in turn, after a round that warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds + 1):
        for name, ask in ways.items():
            seconds, answers = await together(ask, STREAMS, STREAM_TOKENS, STREAMS)
            if number:
                found[name].append(len(answers) * STREAM_TOKENS / seconds)
    return found


async def whole_answers(ways: dict[str, Ask], num_requests: int, num_rounds: int) -> dict[str, dict[str, float]]:
    """Of each way, for whole answers: milliseconds at the median and the 99th percentile, and requests/s."""
    answers: dict[str, list[Timed]] = {name: [] for name in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for number in range(num_rounds + 1):
        for name, ask in ways.items():
            taken, timed = await together(ask, num_requests, ANSWER_TOKENS, LOAD)
            if number:
                seconds[name] += taken
                answers[name] += timed
    return {
        name: {**_percentiles([one.whole_s * 1e3 for one in timed]), "requests_per_s": len(timed) / seconds[name]}
        for name, timed in answers.items()
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(values), "p99_ms": statistics.quantiles(values, n=100)[98]}


async def measure(
    server: TritonServer, gateway: RunningGateway, litellm: RunningGateway | None, key: str, options: Any
) -> Any:
    """All figures."""
    async with AsyncGrpcClient(server.grpc_url, NAME) as client:
        ways = {"triton": over_grpc(client), "gateway": over_http(gateway.url, NAME, key)}
        first = {name: _percentiles(values) for name, values in (await first_tokens(ways, options.requests)).items()}
        rates = {name: statistics.median(values) for name, values in (await throughputs(ways, options.rounds)).items()}
        whole = {"triton": over_grpc(client), "gateway": over_http(gateway.url, NAME, key, is_streamed=False)}
        proxies = {"gateway": gateway} | ({"litellm": litellm} if litellm else {})
        require_same_text({name: proxy.url for name, proxy in proxies.items()}, key)
        if litellm:
            whole["litellm"] = over_http(litellm.url, NAME, key, is_streamed=False)
        answers = await whole_answers(whole, options.requests, options.rounds)
    for name, row in answers.items():
        for figure in ("median_ms", "p99_ms"):
            row[f"added_{figure}"] = row[figure] - answers["triton"][figure]
        if name in proxies:
            row["memory_mib"] = proxies[name].rss_mib()
    return {
        "time_to_first_token": first,
        "added_to_first_token_ms": first["gateway"]["median_ms"] - first["triton"]["median_ms"],
        "tokens_per_s_of_64_streams": rates,
        "throughput": rates["gateway"] / rates["triton"],
        "whole_answers": answers,
    }


def missed(figures: Any) -> list[str]:
    """The targets that `figures` miss."""
    answers = figures["whole_answers"]
    faults = []
    if figures["added_to_first_token_ms"] > MAX_ADDED_MS:
        faults.append(f"added to the first token: {figures['added_to_first_token_ms']:.2f} ms, at most {MAX_ADDED_MS}")
    if figures["throughput"] < MIN_THROUGHPUT:
        faults.append(f"throughput: {figures['throughput']:.3f} of Triton's, at least {MIN_THROUGHPUT}")
    if other := answers.get("litellm"):
        own = answers["gateway"]
        faults += [
            f"LiteLLM's {name} is better: {other[name]:.2f}, the gateway's {own[name]:.2f}"
            for name in ("added_median_ms", "added_p99_ms", "memory_mib", "requests_per_s")
            if (own[name] < other[name]) == (name == "requests_per_s")
        ]
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--litellm", help="the command litellm, in an environment of its own with litellm[proxy]")
    parser.add_argument("--requests", type=int, default=100, help="requests of each way and round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_repository(directory / "models", STREAMS, STEP_S)
        server = stack.enter_context(TritonServer(directory / "models", http_port=0, grpc_port=0, metrics_port=0))
        keys = str(directory / "keys.json")
        own, key = ApiKey.make("benchmark")  # LiteLLM's proxy starts with a key alone: both ask for it
        asyncio.run(open_store(keys).add(own))
        gateway = stack.enter_context(
            gateway_process("--backend-url", server.grpc_url, "--model", NAME, "--keys", keys)
        )
        litellm = options.litellm and stack.enter_context(litellm_proxy(options.litellm, server.http_url, key))
        figures = asyncio.run(measure(server, gateway, litellm, key, options))
    result = {"machine": describe(), "step_ms": STEP_S * 1e3, "requests_at_once": LOAD, **figures}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2, default=str)
    (RESULTS / "gateway-latency.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    for fault in (faults := missed(figures)):
        print(f"MISSED {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
