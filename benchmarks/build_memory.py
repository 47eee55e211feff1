"""Measure the memory and time of a build, from a random checkpoint of a DeepSeek model's shape.

    python -m benchmarks.build_memory DIRECTORY [--shape 7b | v3] [--layers 28] [--precision fp16 fp32]

writes the checkpoint (of the 7B, 15 GB in bfloat16) and the repository into DIRECTORY, removes both, prints the figures
and writes benchmarks/results/build-memory.json, or build-memory-v3.json. The build runs in a process of its own; its
peak is what the kernel saw.

`v3` is DeepSeek-V3 with every width divided by four, and as many experts, groups and heads: one dense layer and two of
256 experts take 2.6 GiB. Its experts are many small tensors, which the graph has stacked.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe
from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.ensemble.decoder.spec import ModelSpec

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
SHARD_BYTES = 5 * 10**9
BLOCK_BYTES = 64 * 2**20
MAX_SEQ_LEN = 1024  # what the model is built for, where its own length would make large tables
# https://huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-7B/blob/main/config.json
SEVEN_B: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False, "use_sliding_window": False,
    "eos_token_id": 151643, "torch_dtype": "bfloat16",
}  # fmt: skip
# https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json, every width and the vocabulary divided by four
V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 32320, "hidden_size": 1792, "intermediate_size": 4608,
    "moe_intermediate_size": 448, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 384, "kv_lora_rank": 128, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False,
    "eos_token_id": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES = {"7b": ("DeepSeek-R1-Distill-Qwen-7B", SEVEN_B), "v3": ("DeepSeek-V3, widths divided by four", V3)}


def write_checkpoint(directory: Path, config: dict[str, Any]) -> ModelSpec:
    """Write a checkpoint with little memory: every tensor repeats the same random block."""
    spec = from_hf(config)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(directory, spec.vocab_size)
    block = np.random.default_rng(0).normal(scale=0.02, size=BLOCK_BYTES // 2).astype(ml_dtypes.bfloat16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in spec.tensor_shapes().items():
        if shards[-1] and sum(map(_num_bytes, shards[-1].values())) + _num_bytes(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    for number, shapes in enumerate(shards, 1):
        _write_shard(directory / f"model-{number:05}-of-{len(shards):05}.safetensors", shapes, block)
    return spec


def _num_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * 2


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: NDArray[Any]) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + _num_bytes(shape)],
        }  # fmt: skip
        offset += _num_bytes(shape)
    text = json.dumps(header).encode()
    data = block.view(np.uint8).data
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        left = offset
        while left:
            left -= stream.write(data[: min(left, len(data))])


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a tokenizer with one token for each byte, and filler tokens up to the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"<|{number}|>" for number in range(len(names), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def measure_build(checkpoint: Path, repository: Path, precision: str) -> tuple[float, float]:
    """Peak memory in GiB and seconds of `deepseek-triton build`, then remove what it built."""
    # A process in between, because the kernel's peak of children is the largest of all children so far.
    program = """
import json, resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(json.dumps([status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""
    command = [
        sys.executable, "-m", "deepseek_triton.builders.cli", "build", str(checkpoint),
        "--name", "large", "--repository", str(repository), "--precision", precision,
        "--max-seq-len", str(MAX_SEQ_LEN),
    ]  # fmt: skip
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program, *command], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    status, peak_kib = json.loads(result.stdout.splitlines()[-1])
    if status != 0:
        raise RuntimeError(f"the build ended with status {status}")
    shutil.rmtree(repository)
    return peak_kib * 1024 / GIB, seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if there is no room."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path, help="on the disk to use; what is made in it is removed")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="default: the shape's own")
    parser.add_argument("--precision", nargs="+", default=["fp16"], choices=["fp16", "fp32"])
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results")
    arguments = parser.parse_args(argv)
    shape_of, config = SHAPES[arguments.shape]
    config = {**config, "num_hidden_layers": arguments.layers or config["num_hidden_layers"]}
    suffix = "" if arguments.shape == "7b" else f"-{arguments.shape}"
    output = arguments.output or RESULTS / f"build-memory{suffix}.json"
    spec = from_hf(config)
    needed = spec.num_parameters() * (2 + max({"fp16": 2, "fp32": 4}[name] for name in arguments.precision))
    free = shutil.disk_usage(arguments.directory).free
    if free < needed * 1.05:
        print(
            f"error: {arguments.directory}: {needed / GIB:.0f} GiB needed, {free / GIB:.0f} GiB free", file=sys.stderr
        )
        return 1

    result: dict[str, Any] = {"machine": describe(), "builds": {}}
    with tempfile.TemporaryDirectory(prefix="build-memory-", dir=arguments.directory) as name:
        checkpoint = Path(name) / "checkpoint"
        print(f"writing {spec.num_parameters() * 2 / GIB:.1f} GiB of weights", flush=True)
        write_checkpoint(checkpoint, config)
        sizes = sorted((_num_bytes(shape) for shape in spec.tensor_shapes().values()), reverse=True)
        result["checkpoint"] = {
            "shape_of": shape_of,
            "num_layers": spec.num_layers,
            "num_parameters": spec.num_parameters(),
            "dtype": "bfloat16",
            "gib": round(sum(sizes) / GIB, 2),
            "largest_tensors_gib": [round(size / GIB, 3) for size in sizes[:4]],
        }
        for precision in arguments.precision:
            peak, seconds = measure_build(checkpoint, Path(name) / "models", precision)
            result["builds"][precision] = {
                "peak_gib": round(peak, 2),
                "peak_over_largest_tensor": round(peak * GIB / sizes[0], 2),
                "peak_over_checkpoint": round(peak * GIB / sum(sizes), 3),
                "seconds": round(seconds, 1),
            }
            print(f"{precision}: peak {peak:.2f} GiB, {seconds:.0f} s", flush=True)
    result["this_process_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
