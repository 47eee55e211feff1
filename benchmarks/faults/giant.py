"""One client sends a prompt of 40 MB, which is refused: how much longer others' answers take, and who computes."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults.served import NAME, Served
from deepseek_triton.clients import GenerateRequest, GrpcClient, HttpClient

NUM_BYTES = 40_000_000
NUM_TRIES = 8
NUM_USUAL = 10  # answers with nobody beside
MAX_TOKENS = 24
AFTER_S = 0.3  # the server's work that follows its refusal
CLIENTS: dict[str, Any] = {"HTTP": HttpClient, "gRPC": GrpcClient}
# A process of its own, so that making the body delays nobody: it sends the prompt after each line on standard input.
SENDER = """
import http.client, json, sys, threading, urllib.parse
kind, url, name, num_bytes = sys.argv[1:]
text = ("the quick brown fox " * (int(num_bytes) // 20 + 1))[: int(num_bytes)]
if kind == "HTTP":
    body = json.dumps({"text_input": text, "max_tokens": 1}).encode()
    def send():
        connection = http.client.HTTPConnection(urllib.parse.urlparse(url).netloc)
        connection.request("POST", f"/v2/models/{name}/generate", body, {"Content-Type": "application/json"})
        answer = connection.getresponse().read().decode()
        connection.close()
        return answer
else:
    import numpy as np
    from tritonclient.grpc import InferenceServerClient, InferInput
    tensors = [InferInput("text_input", [1, 1], "BYTES"), InferInput("max_tokens", [1, 1], "INT32")]
    tensors[0].set_data_from_numpy(np.array([[text.encode()]], np.object_))
    tensors[1].set_data_from_numpy(np.array([[1]], np.int32))
    def send():
        client, answers, came = InferenceServerClient(url), [], threading.Event()
        client.start_stream(lambda result, error: (answers.append(str(error)), came.set()))
        client.async_stream_infer(name, tensors)
        came.wait()
        client.close()
        return answers[0]
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(send()[-200:]), flush=True)
"""


class Neighbour:
    """Asks for one answer after the other. `answers`: when each began, and when it was whole."""

    def __init__(self, kind: str, served: Served) -> None:
        self.answers: list[tuple[float, float]] = []
        self._client = CLIENTS[kind](served.grpc if kind == "gRPC" else served.http, NAME)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for number in itertools.count():
            if self._ending.is_set():
                return
            start = time.monotonic()
            request = GenerateRequest(prompt=f"{number} The sky is", max_tokens=MAX_TOKENS, end_id=-1)
            for _ in self._client.stream(request):
                pass
            self.answers.append((start, time.monotonic()))
            self._ending.wait(0.05)

    def wait_until_after(self, moment: float) -> None:
        """Wait for the end of an answer that began after `moment`."""
        while not self.answers or self.answers[-1][0] < moment:
            time.sleep(0.01)

    def close(self) -> None:
        """End after the answer that comes."""
        self._ending.set()
        self._thread.join()
        self._client.close()


def giants(served: Served) -> dict[str, Any]:
    """Each protocol of the prompt beside each of the neighbour; times in milliseconds."""
    return {f"{kind} beside {other}": _beside(served, kind, other) for kind in CLIENTS for other in CLIENTS}


def _beside(served: Served, kind: str, other: str) -> dict[str, Any]:
    neighbour = Neighbour(other, served)
    url = served.grpc if kind == "gRPC" else served.http
    command = [sys.executable, "-c", SENDER, kind, url, NAME, str(NUM_BYTES)]
    longer, taken, cpu, answer = [], [], [], ""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdin is not None and sender.stdout is not None
        sender.stdout.readline()
        first = len(neighbour.answers) + 1  # making the body was beside the one before
        while len(neighbour.answers) < first + NUM_USUAL:
            time.sleep(0.01)
        usual_s = statistics.median(end - start for start, end in neighbour.answers[first:])
        for _ in range(NUM_TRIES):
            before, start = _cpu_ms(served), time.monotonic()
            sender.stdin.write("\n")
            sender.stdin.flush()
            answer = json.loads(sender.stdout.readline())
            end = time.monotonic()
            time.sleep(AFTER_S)
            cpu.append(_cpu_ms(served) - before)
            neighbour.wait_until_after(end + AFTER_S)
            beside = [last - begun for begun, last in neighbour.answers if last > start and begun < end + AFTER_S]
            longer.append(round(1000 * (max(beside) - usual_s)))
            taken.append(round(1000 * (end - start)))
        sender.stdin.close()
    neighbour.close()
    busiest = [max(value for thread, value in used.items() if "/" in thread) for used in cpu]
    return {
        "answer_usual": round(1000 * usual_s), "longer": sorted(longer), "longer_median": statistics.median(longer),
        "refused_after_median": statistics.median(taken), "refusal": answer,
        "cpu_median": {
            name: round(statistics.median(used[name] for used in cpu)) for name in ("tritonserver", "tokenizer")
        },
        "cpu_of_tritonservers_busiest_thread_median": round(statistics.median(busiest)),
    }  # fmt: skip


def _cpu_ms(served: Served) -> Counter[str]:
    """The CPU time of each process, and of tritonserver's threads."""
    found: Counter[str] = Counter()
    for name, pid in served.processes().items():
        for path in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                used = int((path / "schedstat").read_text().split()[0]) // 1_000_000
                found[name] += used
                if name == "tritonserver":
                    found[f"{name}/{path.name}"] = used
    return found
