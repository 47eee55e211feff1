"""A demo model under `deepseek-triton serve`, whose processes can be found, struck and watched. Linux only."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

NAME = "smollm2"
PARTS = ("tokenizer", "engine", "detokenizer")


class Served:
    """`serve` on a repository with the demo model; a context manager. `lines` are what it has printed."""

    def __init__(self, repository: Path, log: Path, temporary: Path | None = None) -> None:
        environment = os.environ | ({} if temporary is None else {"TMPDIR": str(temporary)})
        command = [sys.executable, "-u", "-m", "deepseek_triton.builders.cli", "serve", str(repository)]
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--log", str(log)]
        self.begun = time.monotonic()
        self._process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True, env=environment)
        self._repository = repository
        self.lines: list[str] = []
        self.times: list[float] = []  # when each came
        self._addresses: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        found = {self._addresses.get(timeout=300) for _ in range(3)}
        self.http = next(a for a in found if a.startswith("http") and not a.endswith("metrics"))
        self.grpc = next(a for a in found if not a.startswith("http"))
        self.metrics_url = next(a for a in found if a.endswith("metrics"))
        self.load_s = time.monotonic() - self.begun

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)

    def _read(self) -> None:
        assert self._process.stdout is not None
        seen: set[str] = set()
        for line in self._process.stdout:
            self.lines.append(line.strip())
            self.times.append(time.monotonic())
            for address in re.findall(r"http://[\d.]+:\d+(?:/metrics)?|127\.0\.0\.1:\d+", line):
                if address not in seen and f"http://{address}" not in line:
                    seen.add(address)
                    self._addresses.put(address)

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self._process.pid

    def processes(self) -> dict[str, int]:
        """Name → process id of the supervisor, tritonserver and the models' processes."""
        found = {"supervisor": self.pid}
        for server in children(self.pid):
            if b"bin/tritonserver" in command_of(server):
                found["tritonserver"] = server
                for child in children(server):
                    parts = (p for p in PARTS if f"{NAME}-{p}/".encode() in command_of(child))
                    found |= {part: child for part in parts}
        return found

    def ask(self, timeout_s: float = 60.0, **fields: Any) -> httpx.Response:
        """One request over HTTP."""
        body = {"text_input": "The sky is", "max_tokens": 2, **fields}
        return httpx.post(f"{self.http}/v2/models/{NAME}/generate", json=body, timeout=timeout_s)

    def last_load_s(self) -> float:
        """Seconds from the last restart's beginning, after its wait, to the line that the model is ready."""
        begun = max(index for index, line in enumerate(self.lines) if "starting it again" in line)
        wait_s = float(self.lines[begun].split()[-2])
        ready = self.lines.index(f"ready: {NAME}", begun)
        return self.times[ready] - self.times[begun] - wait_s

    def is_ready(self) -> bool:
        """Whether the server calls itself ready."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.http}/v2/health/ready", timeout=1).status_code == 200
        return False

    def wait_for_answer(self, limit_s: float = 120.0) -> float:
        """Seconds until a request is answered."""
        start = time.monotonic()
        while time.monotonic() - start < limit_s:
            with contextlib.suppress(httpx.HTTPError):
                if self.ask(timeout_s=20).status_code == 200:
                    return time.monotonic() - start
            time.sleep(0.05)
        raise TimeoutError(f"no answer in {limit_s} s; serve printed {self.lines[-3:]}")

    def metrics(self) -> dict[str, float]:
        """The engine's numbers, without histograms' buckets."""
        pairs = re.findall(r"^deepseek_(\w+)\{[^}]*\} (\S+)$", httpx.get(self.metrics_url).text, re.MULTILINE)
        return {name: float(value) for name, value in pairs if not name.endswith("_bucket")}

    def memory_mib(self) -> dict[str, int]:
        """Resident memory of each process."""
        return {name: resident_mib(pid) for name, pid in self.processes().items()}


def children(parent: int) -> list[int]:
    """The process ids of a process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def command_of(pid: int) -> bytes:
    """A process's command line."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def resident_mib(pid: int) -> int:
    """A process's resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20
