"""How long a checkpoint takes to become an FP8 engine of target cuda, and how long that engine takes to load.

    python -m benchmarks.fp8_build_gpu make 7b WORK              the shape's checkpoint, random BF16, in shards
    python -m benchmarks.fp8_build_gpu build 7b WORK --recipe fast
    python -m benchmarks.fp8_build_gpu load 7b WORK --recipe fast    and one request
    python -m benchmarks.fp8_build_gpu estimate 70b WORK --recipe fast     builds two layers, and says what 80 take
    python -m benchmarks.fp8_build_gpu all 7b WORK               all of it, one process after the other, 70b included

Each command adds its figures to benchmarks/results/fp8-build-gpu.json. `make` draws on the GPU where torch sees one.
A tokenizer may be given (a directory with tokenizer.json); else bytes are tokens. On a machine without a GPU the
commands `make` and `build` work too; `--layers` makes the shape smaller.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.cuda_settings import CUDA_SETTINGS
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.protocol.settings import EngineSettings

RESULT = Path(__file__).parent / "results" / "fp8-build-gpu.json"
SHARD_BYTES = 5 * 10**9
MAX_SEQ_LEN = 4096
ANSWER = 32  # tokens of the request after loading
ESTIMATED_FROM = 2  # layers
STEPS_TOLD = ("calibrate", "quantize")  # stages whose every step is printed


@dataclass(frozen=True)
class Shape:
    """A config.json's dimensions."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False

    def config(self, num_layers: int) -> dict[str, Any]:
        """config.json of the shape with `num_layers` layers."""
        return {
            **self.__dict__, "num_hidden_layers": num_layers, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "bfloat16",
            "eos_token_id": 0,
        }  # fmt: skip


SHAPES = {
    "1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 151936),  # DeepSeek-R1-Distill-Qwen-1.5B
    "7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 152064),  # DeepSeek-R1-Distill-Qwen-7B
    "70b": Shape("llama", 8192, 28672, 80, 64, 8, 128256),  # DeepSeek-R1-Distill-Llama-70B
    "tiny": Shape("qwen2", 64, 128, 4, 4, 2, 320),  # to try the commands
}


class Peaks:
    """The most host memory of this process, and GPU memory of the whole GPU, while the context lasts."""

    def __enter__(self) -> Peaks:
        self.gpu_bytes, self._is_over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def figures(self) -> dict[str, float]:
        """In GB."""
        return {"peak_host_gb": round(self.host_bytes / 1e9, 2), "peak_gpu_gb": round(self.gpu_bytes / 1e9, 2)}

    def _watch(self) -> None:
        try:
            import torch
        except ModuleNotFoundError:
            return
        while torch.cuda.is_available() and not self._is_over.wait(0.05):
            free, total = torch.cuda.mem_get_info()
            self.gpu_bytes = max(self.gpu_bytes, total - free)


class Phases:
    """A build's `report` that remembers when each stage, and each step of a stage, began."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seen: dict[str, list[float]] = {}

    def report(self, what: str, done: int, total: int) -> None:
        """See BuildOptions' Report."""
        seconds = time.perf_counter() - self._began
        times = self._seen.setdefault(what, [])
        if not times or what in STEPS_TOLD:
            print(f"{seconds:8.2f} s  {what} {done} of {total}", file=sys.stderr, flush=True)
        times.append(seconds)

    def figures(self) -> dict[str, Any]:
        """stage → the second in which it began, in which its last step began, and the median step's seconds."""
        return {
            what: {
                "first_s": round(times[0], 2),
                "last_s": round(times[-1], 2),
                "step_s": round(float(np.median(np.diff(times))), 4) if len(times) > 1 else None,
            }
            for what, times in self._seen.items()
        }


def make(shape: Shape, num_layers: int, directory: Path, tokenizer: Path | None) -> dict[str, Any]:
    """Write the checkpoint."""
    began = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config(num_layers)), encoding="utf-8")
    if tokenizer is None:
        write_byte_tokenizer(directory)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, directory / name)
    from deepseek_triton.builders.checkpoint.config.hf_config import from_hf

    shapes = from_hf(shape.config(num_layers)).tensor_shapes()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, dimensions in shapes.items():
        num_bytes = 2 * int(np.prod(dimensions))
        if size and size + num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = dimensions
        size += num_bytes
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return {"gb": round(total / 1e9, 2), "shards": len(shards), "seconds": round(time.perf_counter() - began, 1)}


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random BF16 tensors in one safetensors file."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for index, (name, shape) in enumerate(shapes.items()):
            for block in random_blocks(name, shape, index):
                stream.write(block.data)


def random_blocks(name: str, shape: tuple[int, ...], seed: int) -> Iterator[NDArray[np.uint16]]:
    """A tensor's bits in bfloat16, in row blocks: norms are 1, matrices normal, as wide as keeps activations finite."""
    if name.endswith("norm.weight"):
        yield np.full(shape, 0x3F80, np.uint16)
        return
    std = 0.02 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5
    rows = max(1, 2**26 // shape[-1]) if len(shape) == 2 else shape[0]
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), *shape[1:])
        yield on_gpu(size, std, seed + start) if has_gpu() else on_cpu(size, std, seed + start)


def on_gpu(shape: tuple[int, ...], std: float, seed: int) -> NDArray[np.uint16]:
    """Normal numbers as bfloat16's bits."""
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.empty(shape, device="cuda").normal_(0, std, generator=generator).bfloat16()
    bits: NDArray[np.uint16] = values.view(torch.int16).cpu().numpy().view(np.uint16)
    return bits


def on_cpu(shape: tuple[int, ...], std: float, seed: int) -> NDArray[np.uint16]:
    """Normal numbers as bfloat16's bits."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(std)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def has_gpu() -> bool:
    """Whether torch sees an NVIDIA GPU."""
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return bool(torch.cuda.is_available())


def write_byte_tokenizer(directory: Path) -> None:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {name: index for index, name in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def timed_build(checkpoint: Path, repository: Path, recipe: str) -> dict[str, Any]:
    """Build for target cuda."""
    phases = Phases()
    options = BuildOptions(
        checkpoint, "model", repository, target="cuda", precision="fp8", recipe=recipe, max_seq_len=MAX_SEQ_LEN
    )
    said: list[str] = []
    with Peaks() as peaks:
        began = time.perf_counter()
        build(options, phases.report, said.append)
        seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return {
        "seconds": round(seconds, 1), "checkpoint_gb_per_s": round(size / 1e9 / seconds, 3), **peaks.figures(),
        "phases": phases.figures(), "said": said,
    }  # fmt: skip


class LoadLog(logging.Handler):
    """The lines that tell where the time of loading goes."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "loading took" in record.getMessage():
            self.lines.append(record.getMessage())


def timed_load(repository: Path) -> dict[str, Any]:
    """Load the engine and answer one request."""
    log = LoadLog()
    logging.basicConfig(level=logging.INFO, handlers=[log, logging.StreamHandler()])
    engine = max((repository / "model-engine").glob("*/manifest.json")).parent
    settings = EngineSettings(**CUDA_SETTINGS.default_values() | {"max_num_seqs": 16})
    with Peaks() as peaks:
        began = time.perf_counter()
        manifest, runner = load_runner(engine, settings)
        loaded = time.perf_counter() - began
        prompt = np.arange(64, dtype=np.int64) + 10
        logits = runner.prefill(0, prompt, 0)
        first = time.perf_counter() - began
        tokens = [int(logits.argmax())]
        for step in range(ANSWER - 1):
            logits = runner.decode(np.array(tokens[-1:]), np.array([len(prompt) + step]))
            tokens.append(int(logits[0].argmax()))
        answered = time.perf_counter() - began
        runner.close()
    size = sum(file.bytes for file in manifest.files.values())
    return {
        "loaded_s": round(loaded, 2), "first_token_s": round(first, 2), "answered_s": round(answered, 2),
        "different_tokens": len(set(tokens)), "engine_gb": round(size / 1e9, 2), "log": log.lines, **peaks.figures(),
    }  # fmt: skip


def run_all(name: str, work: Path, tokenizer: Path | None) -> None:
    """Every command in a process of its own; one that takes too long is ended, and the next one begins."""
    options = [] if tokenizer is None else ["--tokenizer", str(tokenizer)]
    layers = SHAPES[name].num_hidden_layers
    steps: list[tuple[int, list[str]]] = [
        (90, ["make", name]),
        (120, ["build", name, "--recipe", "fast"]),
        (60, ["load", name, "--recipe", "fast", "--label", "first"]),
        (60, ["load", name, "--recipe", "fast", "--label", "second"]),
        (270, ["build", name, "--recipe", "default"]),
        (60, ["load", name, "--recipe", "default"]),
        (90, ["estimate", "70b" if name != "tiny" else "tiny", "--recipe", "fast"]),
        (120, ["estimate", "70b" if name != "tiny" else "tiny", "--recipe", "default"]),
    ]
    for timeout, step in steps:
        words = [sys.executable, "-m", "benchmarks.fp8_build_gpu", *step[:2], str(work), *step[2:], *options]
        try:
            subprocess.run(words, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            record(" ".join(step), {"ended_after_s": timeout})
        if step[-1] == "second":  # room for the next one
            shutil.rmtree(work / f"{name}-{layers}-fast", ignore_errors=True)


def record(key: str, figures: dict[str, Any]) -> None:
    """Add the figures to the result's file, and print them."""
    known: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    known["machine"] = describe()
    known[key] = figures
    RESULT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: figures}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description="FP8 builds for target cuda, timed")
    parser.add_argument("command", choices=("make", "build", "load", "estimate", "all"))
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("work", type=Path, help="directory for checkpoints and engines")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="with tokenizer.json (default: bytes are tokens)")
    parser.add_argument("--label", default="", help="of this run's figures")
    arguments = parser.parse_args(argv)
    if arguments.command == "all":
        run_all(arguments.shape, arguments.work, arguments.tokenizer)
        return 0
    shape, recipe = SHAPES[arguments.shape], arguments.recipe
    num_layers = arguments.layers or (ESTIMATED_FROM if arguments.command == "estimate" else shape.num_hidden_layers)
    checkpoint = arguments.work / f"{arguments.shape}-{num_layers}"
    repository = arguments.work / f"{arguments.shape}-{num_layers}-{recipe}"
    key = f"{arguments.shape}, {num_layers} layers"
    if arguments.command == "make" or (arguments.command == "estimate" and not checkpoint.exists()):
        record(f"make {key}", make(shape, num_layers, checkpoint, arguments.tokenizer))
    if arguments.command in ("build", "estimate"):
        shutil.rmtree(repository, ignore_errors=True)
        figures = timed_build(checkpoint, repository, recipe)
        if arguments.command == "estimate":
            spec = open_checkpoint(checkpoint).spec
            in_layers = sum(int(np.prod(size)) for size in spec.layer_shapes(0).values()) * num_layers
            share = in_layers / spec.num_parameters()
            whole = figures["seconds"] * (share * shape.num_hidden_layers / num_layers + 1 - share)
            figures["estimated_s_of_all_layers"] = round(whole, 1)
        record(f"build {key}, {recipe}", figures)
    if arguments.command == "load":
        record(" ".join(f"load {key}, {recipe} {arguments.label}".split()), timed_load(repository))
    return 0


if __name__ == "__main__":
    sys.exit(main())
