"""Minutes of mixed load with cancels: afterwards the counters are exact, and memory is where it was."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import Any

from benchmarks.faults.served import NAME, Served
from deepseek_triton.clients import GenerateRequest, GrpcClient, HttpClient

NUM_CLIENTS = 6
SETTLE_S = 60.0  # before the first look at memory
CHOICE = GenerateRequest(prompt="Yes or no?", guide_type="choice", guide='["yes", "no"]', max_tokens=4)
CHAT = GenerateRequest(messages=[{"role": "user", "content": "Say hi."}], max_tokens=8)


def one(client: Any, draw: random.Random, counts: Counter[str]) -> None:
    """One request of a random kind."""
    kind = draw.choice(("whole", "stream", "guided", "chat", "cancel"))
    if kind == "cancel":
        endless = GenerateRequest(prompt=f"Count: {draw.random()} 1 2 3", max_tokens=900, end_id=-1)
        stream = client.stream(endless)
        next(stream)
        stream.close()
    elif kind == "stream":
        *_, last = client.stream(GenerateRequest(prompt=f"{draw.random()} is", max_tokens=draw.randint(1, 24)))
        counts["tokens"] += last.num_output_tokens
    else:
        plain = GenerateRequest(prompt="The sky is", max_tokens=draw.randint(1, 24), temperature=1.0)
        answer = client.generate({"whole": plain, "guided": CHOICE, "chat": CHAT}[kind])
        counts["tokens"] += answer.num_output_tokens
    counts[kind] += 1


def mixed_load(served: Served, minutes: float) -> dict[str, Any]:
    """Load the server for so long; compares its counters with what the clients saw."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    lock, end = threading.Lock(), time.monotonic() + 60 * minutes

    def work(number: int) -> None:
        draw, own = random.Random(number), Counter[str]()
        kind, url = (GrpcClient, served.grpc) if number % 2 else (HttpClient, served.http)
        with kind(url, NAME) as client:
            while time.monotonic() < end:
                try:
                    one(client, draw, own)
                except Exception as error:
                    failures.append(repr(error)[:200])
        with lock:
            counts.update(own)

    before, memory = served.metrics(), [served.memory_mib()]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(SETTLE_S, left))
        memory.append(served.memory_mib())
    for thread in threads:
        thread.join()
    time.sleep(3)  # cancelled requests are noticed, and counters published
    after = served.metrics()
    grown = {name: int(after[name] - before[name]) for name in after if name.endswith("_total")}
    num_requests = sum(counts[kind] for kind in ("whole", "stream", "guided", "chat", "cancel"))
    expected = {
        "requests_total": num_requests, "requests_cancelled_total": counts["cancel"], "requests_failed_total": 0,
        "requests_refused_total": 0, "requests_expired_total": 0,
    }  # fmt: skip
    return {
        "minutes": minutes, "requests": dict(counts), "failures": failures[:20], "counters": grown,
        "counters_exact": {name: grown[name] == value for name, value in expected.items()},
        "slots_used": after["slots_used"], "sequences_waiting": after["sequences_waiting"],
        "memory_mib": memory,
    }  # fmt: skip
