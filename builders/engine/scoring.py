"""A scoring model for Triton's own tensorrt backend: the stateless graph as a plan, and its config.pbtxt.

One profile covers every batch and length up to the limits, so any batch that the dynamic batcher forms can
run; CUDA graphs are captured for the shapes that are named. Triton batches requests of one length only:
clients pad to a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf import json_format

from builders.engine.census import Census
from builders.engine.compile import Job, compile_graph, read_graph
from builders.engine.errors import EngineError
from builders.engine.network import STATELESS_FORMS, Profile
from builders.engine.progress import Progress
from builders.engine.target import resolve_target
from builders.files import write_atomically
from builders.pbtxt import ModelConfig
from ensemble.tensorrt_api import PLAN_FILE


@dataclass(frozen=True)
class ScoringLimits:
    """What a scoring plan takes.

    max_batch_size: sequences in one pass. max_seq_len: tokens in each. graph_seq_lens: lengths for which CUDA
    graphs are captured, at batch sizes 1, 2, 4 … max_batch_size; clients that pad to these skip the launch of
    each kernel.
    """

    max_batch_size: int
    max_seq_len: int
    graph_seq_lens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name} is {getattr(self, name)}, must be at least 1")
        for length in self.graph_seq_lens:
            if not 1 <= length <= self.max_seq_len:
                raise EngineError(f"graph_seq_lens has {length}, outside the plan's profile 1 … {self.max_seq_len}")

    @property
    def graph_batch_sizes(self) -> list[int]:
        """Powers of two below the limit, and the limit."""
        sizes = [2**power for power in range(self.max_batch_size.bit_length()) if 2**power < self.max_batch_size]
        return [*sizes, self.max_batch_size]

    def profile(self) -> Profile:
        """The plan's one profile."""
        return Profile(
            "scoring", (1, self.max_batch_size, self.max_batch_size), (1, self.max_seq_len, self.max_seq_len)
        )


@dataclass(frozen=True)
class ScoringReport:
    """What was built: the plan's file and length in bytes, and the network's census."""

    path: Path
    census: Census
    plan_bytes: int
    version: str
    compute_capability: str


def build_scoring_engine(
    stateless_path: Path,
    output_path: Path,
    limits: ScoringLimits,
    *,
    target: str,
    precision: str,
    compute_capability: str | None = None,
    fp8_modules: Sequence[str] = (),
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> ScoringReport:
    """Compile `write_stateless`'s graph; the arguments are build_engine's.

    Raises:
        EngineError: with one line; nothing was written.
    """
    settled = resolve_target(target, precision, compute_capability)
    model = read_graph(stateless_path)
    positions = next((tensor.dims[0] for tensor in model.graph.initializer if tensor.name == "rope.cos"), 0)
    if limits.max_seq_len > positions:
        raise EngineError(f"max_seq_len is {limits.max_seq_len}, the graph has {positions} positions")
    compiled = compile_graph(
        Job(
            settled, model, stateless_path, precision, (limits.profile(),), STATELESS_FORMS[precision],
            fp8_modules=fp8_modules, timing_cache=timing_cache, progress=progress,
        )
    )  # fmt: skip
    write_atomically(output_path, compiled.plan, EngineError)
    size = output_path.stat().st_size
    return ScoringReport(output_path, compiled.census, size, settled.version, settled.compute_capability)


def scoring_config(name: str, stateless_path: Path, limits: ScoringLimits, *, target: str) -> ModelConfig:
    """The config.pbtxt of a plan that `build_scoring_engine` made from the graph at `stateless_path`.

    Raises:
        EngineError: Triton can't load the target's plans.
    """
    if target != "tensorrt":
        raise EngineError(f"Triton's tensorrt backend loads plans of target tensorrt only, not {target}'s")
    graph = read_graph(stateless_path).graph
    shapes = {value.name: _dims(value) for value in graph.input}
    specs = [
        {
            "batch_size": batch_size,
            "input": {tensor: {"dim": [length if d == -1 else d for d in dims]} for tensor, dims in shapes.items()},
        }
        for length in limits.graph_seq_lens
        for batch_size in limits.graph_batch_sizes
    ]
    cuda: dict[str, Any] = {"graphs": True, "graph_spec": specs} if specs else {}
    config = {
        "name": name,
        "platform": "tensorrt_plan",
        "default_model_filename": PLAN_FILE,
        "max_batch_size": limits.max_batch_size,
        "input": [{"name": tensor, "data_type": "TYPE_INT64", "dims": dims} for tensor, dims in shapes.items()],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": _dims(graph.output[0])}],
        # No delay: take what has queued up while the last batch ran, never wait for more.
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
        "instance_group": [{"count": 1, "kind": "KIND_GPU", "profile": ["0"]}],
        **({"optimization": {"cuda": cuda}} if cuda else {}),
    }
    return json_format.ParseDict(config, ModelConfig())


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    """A tensor's dimensions as Triton wants them: without the batch, -1 for a dynamic one."""
    return [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim][1:]
