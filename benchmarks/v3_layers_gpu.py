"""Time layers of DeepSeek-V3's shape, and estimate all of them: python -m benchmarks.v3_layers_gpu [--gpus 2]

Two models of V3's shape with few layers, FP8 with a scale for each row, random weights, pages; on several GPUs
attention and experts are shared out. The difference of their steps is the time of the layers by which they differ.
Writes benchmarks/results/v3-layers-gpu.json; what other runs wrote there is kept.

With figures of one and of two GPUs in the file, `--estimate 8` adds what so many GPUs of that kind would do with all 61
layers: a layer takes a + b / GPUs, and a and b are those of one and two. It is an estimate: nothing else is known of
eight GPUs, least of all what adding up over them costs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decode_gpu import V3, AnyRunner, decode, open_runner, prefill, random_weights
from benchmarks.machine import describe
from deepseek_triton.ensemble.engine.runners.base import PromptChunk

FILE = Path(__file__).parent / "results" / "v3-layers-gpu.json"
FEW, MANY = 4, 8  # layers, of which the first three have no experts
ROWS = (1, 8, 32, 64, 128, 256)
PROMPT, ANSWER = 1024, 2048  # tokens of a request: the published figure's, rounded up
PUBLISHED = {"tokens_per_s": 11489, "requests": 1024, "what": "R1, TensorRT-LLM, 8 x H200, 1,000 + 2,000 tokens"}
STEPS = 24


def main(argv: Sequence[str] | None = None) -> int | str:
    """Measure or estimate, print and write."""
    parser = argparse.ArgumentParser(description="layers of V3's shape")
    parser.add_argument("--gpus", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--estimate", type=int, metavar="GPUS", help="from figures of one and two; needs no GPU")
    parser.add_argument("--output", type=Path, default=FILE, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    known = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    if arguments.estimate is not None:
        if arguments.estimate < 1:
            parser.error(f"--estimate takes a number of GPUs, from 1 on, not {arguments.estimate}")
        missing = [name for name in map(name_of, (1, 2)) if name not in known]
        if missing:
            return f"error: {arguments.output} has no figures of {' and '.join(missing)}"
        found = {f"estimate, {name_of(arguments.estimate)}": estimate(known, arguments.estimate)}
    elif not torch.cuda.is_available():
        return "error: this needs an NVIDIA GPU"
    else:
        machine = describe() | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        found = {name_of(arguments.gpus): {**measure(arguments.gpus), "machine": machine}}
    print(json.dumps(found, indent=1))
    arguments.output.write_text(json.dumps(known | found, indent=1) + "\n", encoding="utf-8")
    return 0


def name_of(gpus: int) -> str:
    """Of so many GPUs' figures in the file."""
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"


def measure(gpus: int) -> dict[str, Any]:
    """Milliseconds of a layer with experts and of all else, for a step of each of `ROWS` and for a prompt's tokens."""
    few, many = (times(layers, gpus) for layers in (FEW, MANY))
    layer = {rows: (many[rows] - few[rows]) / (MANY - FEW) for rows in few}
    num_moe = FEW - 3
    return {
        "layer_ms": {str(rows): round(ms, 4) for rows, ms in layer.items()},
        "rest_ms": {str(rows): round(few[rows] - num_moe * layer[rows], 4) for rows in few},
    }


def times(layers: int, gpus: int) -> dict[int | str, float]:
    """Milliseconds of a step by its rows, and of a prefill of 8,192 tokens, of a model with so many layers."""
    shape = replace(V3, num_layers=layers)
    source = random_weights(shape)
    runner = open_runner(source, shape, gpus, max_num_seqs=max(ROWS), kv_cache="pages", expert_size=gpus)
    found: dict[int | str, float] = {}
    random = np.random.default_rng(0)
    for rows in ROWS:
        tokens = random.integers(0, shape.vocab_size, rows)
        decode(runner, tokens, PROMPT, 4)
        found[rows] = min(_seconds(runner, tokens) for _ in range(3)) / STEPS * 1e3
    prompts = random.integers(0, shape.vocab_size, (8192 // PROMPT, PROMPT))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        prefill(runner, [PromptChunk(slot, ids, 0) for slot, ids in enumerate(prompts)])
        seconds.append(time.perf_counter() - began)
    found["prompt of 8192"] = min(seconds) * 1e3
    runner.close()
    return found


def _seconds(runner: AnyRunner, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    began = time.perf_counter()
    decode(runner, tokens, PROMPT, STEPS)
    return time.perf_counter() - began


def estimate(known: dict[str, Any], gpus: int) -> dict[str, Any]:
    """What so many GPUs would do with all layers: see the module."""
    one, two = known[name_of(1)], known[name_of(2)]

    def of(kind: str, rows: str) -> float:
        """a + b / gpus of the times of one GPU, a + b, and of two, a + b / 2."""
        b = 2 * (one[kind][rows] - two[kind][rows])
        return float(one[kind][rows] - b + b / gpus)

    step = {rows: of("rest_ms", rows) + (V3.num_layers - 3) * of("layer_ms", rows) for rows in one["layer_ms"]}
    prompt_ms = step.pop("prompt of 8192") / 8192 * PROMPT  # of one request
    return {
        "step_ms": {rows: round(ms, 2) for rows, ms in step.items()},
        "prompt_ms": round(prompt_ms, 2),
        "tokens_per_s": {
            rows: round(int(rows) * ANSWER / (ANSWER * ms + int(rows) * prompt_ms) * 1e3) for rows, ms in step.items()
        },
        "requests": f"{PROMPT} + {ANSWER} tokens, as many at once as a step has rows",
        "published": PUBLISHED,
    }


if __name__ == "__main__":
    sys.exit(main())
