"""The part of the loop that serves: promotion and rollback under load, through the gateway."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from deepseek_triton.builders.lifecycle.promotion.route import arms_of
from deepseek_triton.builders.lifecycle.promotion.state import PROMOTED, ROLLING_BACK, PromotionFile
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically
from deepseek_triton.ensemble.server.options import ADMIN_KEY
from deepseek_triton.examples.lifecycle.commands import StepError, answers, resident_mib, run, running
from deepseek_triton.examples.lifecycle.facts import CAPITALS, FACTS
from deepseek_triton.examples.lifecycle.load import Load, ask, figures
from deepseek_triton.free_ports import free_ports

NUM_CALLERS = 3
QUESTIONS = (*(fact.questions()[0] for fact in FACTS), *(f"What is the capital of {land}?" for land in [*CAPITALS][:2]))
BACK_S = 5.0  # of load after the rollback
STAGE_S = 4.0
# Means of three requests, on a machine that the callers keep busy: they tell only a candidate that hardly answers.
SHARES = {
    "shares": "1,10,50,100",
    "by": "request",
    "min-requests": "3",
    "max-stage-s": "1800",
    "max-latency-ratio": "20",
}


@dataclass
class MemoryWatch:
    """The memory of a server and its processes in MiB, looked at once a second. peak: the highest so far."""

    pid: int
    peak: float = 0.0
    _is_over: threading.Event = field(default_factory=threading.Event)

    def now(self) -> float:
        """As it is."""
        found = round(resident_mib(self.pid), 1)
        self.peak = max(self.peak, found)
        return found

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at it until the block ends."""

        def look() -> None:
            while not self._is_over.wait(1.0):
                self.now()

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()


@dataclass(frozen=True)
class LoopServing:
    """A server with a gateway before it. folder: of the loop; name: that clients ask for; stage_s: of each share."""

    folder: Path
    name: str
    stage_s: float = STAGE_S

    @property
    def repository(self) -> Path:
        """The model repository."""
        return self.folder / "models"

    @property
    def routes(self) -> Path:
        """The gateway's route file."""
        return self.folder / "routes.json"

    def promote_and_roll_back(self) -> dict[str, Any]:
        """Serve, promote the candidate under load, roll it back under load; returns what was seen.

        Raises:
            StepError: a server didn't start, or a command failed.
        """
        http, grpc, metrics, port = free_ports(4)
        environment = {ADMIN_KEY: secrets.token_hex(16)}
        url = f"http://127.0.0.1:{port}"
        serve = [
            "deepseek-triton", "serve", str(self.repository), f"--routes={self.routes}", f"--http-port={http}",
            f"--grpc-port={grpc}", f"--metrics-port={metrics}",
        ]  # fmt: skip
        gateway = [
            "deepseek-gateway", "serve", f"--port={port}", f"--backend-url=127.0.0.1:{grpc}",
            f"--routes={self.routes}",
        ]  # fmt: skip
        where = [f"--repository={self.repository}", f"--routes={self.routes}", f"--server=http://127.0.0.1:{http}"]
        rollback = ["deepseek-triton", "rollback", self.name, *where]
        promote = [
            "deepseek-triton", "promote", self.name, str(self.folder / "candidate"),
            f"--report={self.folder / 'report'}", f"--gateway={url}", *where,
            *(f"--{option}={value}" for option, value in SHARES.items()), f"--stage-s={self.stage_s:g}",
        ]  # fmt: skip
        with (
            running(
                serve, self._log("serve"), environment, lambda: answers(f"http://127.0.0.1:{http}/v2/health/ready")
            ) as server,
            running(gateway, self._log("gateway"), environment, lambda: answers(f"{url}/health/ready")),
        ):
            last = PromotionFile(self.repository, self.name).load()
            if last is not None and last.status in (
                PROMOTED,
                ROLLING_BACK,
            ):  # by a run that was ended before it could roll back
                run(rollback, self._log("rollback"), environment)
            known = self._learn_answers(url)
            memory = MemoryWatch(server.pid)
            found: dict[str, Any] = {"memory_mib": {"before": memory.now()}}
            print(f"    {NUM_CALLERS} callers ask {self.name} without pause", flush=True)
            with memory.watching(), Load(url, self.name, QUESTIONS, NUM_CALLERS) as load:
                found["promote_s"] = round(run(promote, self._log("promote"), environment), 1)
            known = self._learn_answers(url)
            found["memory_mib"] |= {"highest": memory.peak, "promoted": memory.now()}
            with Load(url, self.name, QUESTIONS, NUM_CALLERS) as back:
                began = time.monotonic()
                run(rollback, self._log("rollback"), environment)
                time.sleep(BACK_S)
            found["memory_mib"]["rolled_back"] = memory.now()
            first = [one.at - began for one in back.answers if one.model == self.name and one.at > began]
            found["first_answer_after_rollback_s"] = round(min(first), 1) if first else None
            found["promotion_load"] = figures(load, known).to_dict()
            found["rollback_load"] = figures(back, known).to_dict()
            found["answers"] = known
            return found

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _learn_answers(self, url: str) -> dict[str, dict[str, str]]:
        """Model → question → its answer, asked alone. What was asked before a promotion began is kept in a file.

        In the midst of a promotion, which a killed run leaves, each question would go to one of two models.
        """
        path = self.folder / "answers.json"
        known: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if sum(weight > 0 for weight in arms_of(self.routes, self.name).values()) > 1:
            return known
        with httpx.Client(base_url=url, timeout=120) as client:
            for question in QUESTIONS:
                one = ask(client, self.name, question, streams=False)
                known.setdefault(one.model, {})[question] = one.text
                print(f"      {one.model}: {question} {one.text}", flush=True)
        write_atomically(path, (json.dumps(known, indent=1, ensure_ascii=False) + "\n").encode(), StepError)
        return known
