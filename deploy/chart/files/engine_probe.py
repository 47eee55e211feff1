"""Probes of a pod, with Python's library alone: is the engine alive, and has it finished what it had?

`alive STATE SECONDS` fails where sequences have run for SECONDS without a new token; STATE is a file that remembers.
`drain SECONDS` returns when nothing runs or waits, or after SECONDS. METRICS_URL is Triton's own unless it is set.
"""

import json
import os
import re
import sys
import time
import urllib.request
from pathlib import Path

URL = os.environ.get("METRICS_URL", "http://127.0.0.1:8002/metrics")
SAMPLE = re.compile(r'^deepseek_(\w+)\{.*?model="([^"]+)".*?\} (\S+)$', re.MULTILINE)
COUNTED = ("generated_tokens_total", "prompt_tokens_total")
NETWORK_S = 5  # until every proxy knows that the pod gets no new requests


def read() -> dict[str, dict[str, float]]:
    """Model → name → value."""
    with urllib.request.urlopen(URL, timeout=4) as response:
        text = response.read().decode()
    models: dict[str, dict[str, float]] = {}
    for name, model, value in SAMPLE.findall(text):
        models.setdefault(model, {})[name] = float(value)
    return models


def alive(state_path: str, limit_s: float) -> list[str]:
    """The engines that have sequences and got no further within limit_s."""
    state_file = Path(state_path)
    try:
        before = json.loads(state_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    now, state, stalled = time.time(), {}, []
    for model, values in read().items():
        tokens = sum(values.get(name, 0) for name in COUNTED)
        seen = before.get(model, {"tokens": None, "since": now})
        since = seen["since"] if seen["tokens"] == tokens and values.get("slots_used", 0) > 0 else now
        state[model] = {"tokens": tokens, "since": since}
        if now - since > limit_s:
            stalled.append(f"{model} has computed no token for {now - since:.0f} s")
    written = state_file.with_suffix(".new")
    written.write_text(json.dumps(state), encoding="utf-8")
    written.replace(state_file)
    return stalled


def drain(limit_s: float, network_s: float = NETWORK_S) -> None:
    """Wait until nothing runs; a server that doesn't answer has nothing."""
    end = time.monotonic() + limit_s
    time.sleep(min(network_s, limit_s))
    while time.monotonic() < end:
        try:
            models = read().values()
        except OSError:
            return
        if not any(values.get("slots_used", 0) + values.get("sequences_waiting", 0) for values in models):
            return
        time.sleep(0.5)


if __name__ == "__main__":
    if sys.argv[1] == "drain":
        drain(float(sys.argv[2]))
    else:
        try:
            problems = alive(sys.argv[2], float(sys.argv[3]))
        except OSError as error:
            problems = [f"{URL}: {error}"]
        sys.exit("; ".join(problems) or 0)
