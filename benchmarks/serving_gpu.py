"""Measure Triton's overhead over the cuda runner: the same requests on the runner alone and through the ensemble.

DeepSeek-R1-Distill-Qwen-7B's shape (--shape: another of decode_gpu.py) with random weights; text goes in and out by the
tokenizer of the repository that is given, whose engine is replaced.
    python -m benchmarks.serving_gpu REPOSITORY NAME [--shape v2-lite]
REPOSITORY holds a built model NAME (`deepseek-triton build`); writes benchmarks/results/serving-gpu.json, of another
shape beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.machine import describe
from deepseek_triton.ensemble.artefacts.cuda_settings import CUDA_SETTINGS
from deepseek_triton.ensemble.server.tritonserver import TritonServer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PROMPT, ANSWER, LONG_ANSWER = 512, 128, 512  # tokens
STREAMS = (64, 128)
ROUNDS = 3
TARGETS = {"time between tokens, 1 stream, over the runner's": 1.05, "tokens/s over the runner's": 0.9}
DEFAULTS = CUDA_SETTINGS.default_values()
# The defaults of target cuda, but for the slots.
SETTINGS = {
    "max_num_seqs": max(STREAMS),
    "max_num_batched_tokens": DEFAULTS["max_num_batched_tokens"],
    "max_prefill_stall": DEFAULTS["max_prefill_stall"],
    "kv_cache": DEFAULTS["kv_cache"],
}
DEFAULT_SHAPE = "r1-distill-qwen-7b"
MODEL = """\
import os

from benchmarks.decode_gpu import SHAPES, random_weights
from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.models import engine


def load(directory, settings):
    shape = SHAPES[os.environ["BENCHMARK_SHAPE"]]
    runner = CudaRunner(
        random_weights(shape), shape,
        max_num_seqs=settings.max_num_seqs, max_num_batched_tokens=settings.max_num_batched_tokens,
        cache_form=CacheForm(settings.kv_cache),
    )  # fmt: skip
    return Manifest.load(directory), runner


assert hasattr(engine, "load_model")  # what takes its place must be what is called
engine.load_model = load
TritonPythonModel = engine.TritonPythonModel
"""
# In a process of its own, which gives the GPU's memory back when it ends.
ALONE = """
import json, sys
from benchmarks import decode_gpu as gpu
shape = gpu.SHAPES[{shape!r}]
runner = gpu.open_runner(gpu.random_weights(shape), shape, 1, max_num_seqs={slots}, max_num_batched_tokens={chunk},
                         kv_cache={kv_cache!r})
print(json.dumps({{"gpu": gpu.torch.cuda.get_device_name(),
                  "time_between_tokens_ms": gpu.time_between_tokens(runner) * 1e3,
                  "tokens_per_s": {{n: gpu.tokens_per_second(runner, n) for n in {streams}}}}}))
"""


def write_repository(source: Path, name: str, target: Path) -> None:
    """Copy the model `name` without its weights; the copy's engine runs random weights on the GPU."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.data", "*.onnx"))
    config = target / f"{name}-engine" / "config.pbtxt"
    text = config.read_text()
    for key, value in SETTINGS.items():
        before, _, after = text.partition(f'key: "{key}"')
        head, _, tail = after.partition('string_value: "')
        text = f'{before}key: "{key}"{head}string_value: "{value}"{tail.partition(chr(34))[2]}'
    config.write_text(text)
    (version,) = (path for path in config.parent.iterdir() if path.is_dir())
    (version / "model.py").write_text(MODEL)


async def stream(stub: Any, name: str, prompt: str, num_tokens: int) -> list[tuple[float, int]]:
    """The time of each response, and the number of tokens until then."""
    request = service_pb2.ModelInferRequest(model_name=name)
    text = prompt.encode()
    for tensor, datatype, raw in (
        ("text_input", "BYTES", struct.pack("<I", len(text)) + text),
        ("max_tokens", "INT32", struct.pack("<i", num_tokens)),
        ("end_id", "INT32", struct.pack("<i", -1)),
        ("stream", "BOOL", b"\1"),
    ):
        request.inputs.add(name=tensor, datatype=datatype, shape=(1, 1))
        request.raw_input_contents.append(raw)
    request.outputs.add(name="num_output_tokens")
    seen: list[tuple[float, int]] = []
    count = 0
    async for response in stub.ModelStreamInfer(iter([request]), timeout=240):
        if response.error_message:
            raise RuntimeError(response.error_message)
        count += struct.unpack("<i", response.infer_response.raw_output_contents[0])[0]
        seen.append((time.perf_counter(), count))
    if not seen or seen[-1][1] != num_tokens:
        raise RuntimeError(f"a stream of {num_tokens} tokens ended as {seen[-1:]}")
    return seen


async def through_triton(url: str, name: str) -> dict[str, Any]:
    """The same figures as the runner's, measured by a client."""
    between: list[float] = []
    rates: dict[int, list[float]] = {n: [] for n in STREAMS}
    async with grpc.aio.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for number in range(ROUNDS + 1):  # the first warms up
            seen = await stream(stub, name, prompt_text(number, 0), LONG_ANSWER)
            (first_at, first), (last_at, last) = seen[0], seen[-1]
            between.append((last_at - first_at) / (last - first) * 1e3)
            for n in STREAMS:
                start = time.perf_counter()
                prompts = (prompt_text(number, n + i) for i in range(n))
                await asyncio.gather(*(stream(stub, name, prompt, ANSWER) for prompt in prompts))
                rates[n].append(n * ANSWER / (time.perf_counter() - start))
                print(f"round {number}: {between[-1]:.3f} ms, {n} streams: {rates[n][-1]:.0f} tokens/s", flush=True)
    return {
        "time_between_tokens_ms": statistics.median(between[1:]),
        "tokens_per_s": {n: statistics.median(values[1:]) for n, values in rates.items()},
    }


def prompt_text(number: int, index: int) -> str:
    """About 512 tokens with a beginning that no other prompt has."""
    return f"{number * 1000 + index} " + "word " * (PROMPT - 6)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("repository", type=Path)
    parser.add_argument("name")
    parser.add_argument("--shape", default=DEFAULT_SHAPE, help="a shape of decode_gpu.py (default: %(default)s)")
    arguments = parser.parse_args(argv)
    from benchmarks.decode_gpu import SHAPES  # which needs torch: --help doesn't

    if arguments.shape not in SHAPES:
        parser.error(f"--shape is {arguments.shape!r}, known are: {', '.join(SHAPES)}")
    os.environ["BENCHMARK_SHAPE"] = arguments.shape  # of MODEL
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    program = ALONE.format(
        shape=arguments.shape, slots=max(STREAMS), streams=STREAMS, chunk=DEFAULTS["max_num_batched_tokens"],
        kv_cache=DEFAULTS["kv_cache"],
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, timeout=240)
    alone = json.loads(done.stdout.splitlines()[-1])
    print("alone:", alone, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        models = Path(directory) / "models"
        write_repository(arguments.repository, arguments.name, models)
        log = Path(directory) / "log"
        try:
            with TritonServer(models, http_port=0, grpc_port=0, metrics_port=0, log_file=log) as server:
                served = asyncio.run(through_triton(server.grpc_url, arguments.name))
        except Exception:
            print(log.read_text()[-4000:], file=sys.stderr)
            raise
    ratios = {"time between tokens": served["time_between_tokens_ms"] / alone["time_between_tokens_ms"]}
    ratios |= {f"tokens/s, {n} streams": served["tokens_per_s"][n] / alone["tokens_per_s"][str(n)] for n in STREAMS}
    machine = describe() | {"gpu": alone.pop("gpu")}
    result = {"machine": machine, "settings": SETTINGS, "targets": TARGETS, "runner": alone, "triton": served}
    result["triton / runner"] = {name: round(value, 3) for name, value in ratios.items()}
    RESULTS.mkdir(exist_ok=True)
    file = "serving-gpu.json" if arguments.shape == DEFAULT_SHAPE else f"serving-gpu-{arguments.shape}.json"
    (RESULTS / file).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["triton / runner"], indent=1))
    is_met = ratios["time between tokens"] <= 1.05 and all(ratios[f"tokens/s, {n} streams"] >= 0.9 for n in STREAMS)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
