"""A process that renders chat templates under limits, one after the other.

    python -m deepseek_triton.ensemble.text.chat.worker STARTER_PID

It reads jobs and writes results, one line of JSON each. A template that takes too long is ended by SIGALRM, and this
process with it; one that takes too much memory gets an error. The process ends with the one that started it.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

from deepseek_triton.ensemble.processes.parent import end_with
from deepseek_triton.ensemble.text.chat.environment import make_environment
from deepseek_triton.ensemble.text.errors import one_line


@lru_cache(maxsize=8)
def compiled(source: str) -> Any:
    """The template of `source`."""
    return make_environment().from_string(source)


def render(line: bytes) -> dict[str, str]:
    """{"text": the prompt} or {"error": why there is none}."""
    pieces, length = [], 0
    try:
        job = json.loads(line)
        limit = job["max_chars"]
        for piece in compiled(job["source"]).generate(job["variables"]):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                return {"error": f"it makes more than {limit} characters of them"}
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": "it needs too much memory for them"}
    except Exception as error:  # the template runs on the client's data, so every error is the client's
        return {"error": one_line(error)[:1000]}


def main(starter: int) -> None:
    """Answer every job until standard input or process `starter` ends."""
    end_with(starter)
    jobs, results = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limits = json.loads(jobs.readline())
    resource.setrlimit(resource.RLIMIT_AS, (limits["max_bytes"], limits["max_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in jobs:
        signal.setitimer(signal.ITIMER_REAL, limits["max_s"])
        result = json.dumps(render(line)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        results.write(result + b"\n")
        results.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
