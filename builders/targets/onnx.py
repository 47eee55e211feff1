"""Target onnx: ONNX Runtime on a CPU runs the graph as it is."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version as package_version

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets.artefacts.memory import ServingMemory, host_memory, host_memory_bytes
from deepseek_triton.builders.targets.artefacts.target import Artefacts, BuildJob, CacheBudget, Target
from deepseek_triton.ensemble.decoder.architectures import PARTS
from deepseek_triton.ensemble.protocol.settings import EngineSettings

# opset → the first ONNX Runtime that runs every operator of the graph in it
ONNX_RUNTIME_FOR_OPSET = {24: (1, 24), 23: (1, 23)}
SCORING_OPSET = 24
# FP8 products are computed since 1.25; 1.29 makes integer products of them when it optimises, and refuses those.
ONNX_RUNTIME_FOR_FP8, WITHOUT_FP8 = (1, 25), (1, 29)
CACHE_SHARE = 8  # default caches take at most an eighth of the host's memory
# Where attention isn't one node (latent attention, heads that are no multiple of 16), ONNX Runtime computes it over a
# slot's whole length, filled or not: at 8,192 a step of SmolLM2 took 1.5 times as long as at 2,048.
MAX_TOKENS = 8192


class OnnxTarget(Target):
    """Writes model.onnx and its weights."""

    name = "onnx"
    precisions = ("fp32", "fp16", "int4", "int8", "stored", "fp8")
    tasks = ("generate", "score")
    parts = PARTS
    quantized_parts = PARTS
    packages = ("onnx", "onnxruntime")

    def cache_budget(self) -> CacheBudget:
        """See Target."""
        return CacheBudget(
            num_bytes=host_memory_bytes() // CACHE_SHARE,
            num_seqs=EngineSettings.max_num_seqs,
            what="an eighth of this machine's memory",
            max_tokens=MAX_TOKENS,
        )

    def memory(self, named: str | None) -> ServingMemory:
        """See Target: the machine's."""
        return host_memory(named)

    def write(self, job: BuildJob, settings: EngineSettings) -> Artefacts:
        """See Target."""
        from deepseek_triton.builders.targets.artefacts.graph import DATA_FILE, graph_shapes, write_graph

        opset, precision = newest_opset(), job.options.precision
        _check_fp8(precision)
        # FP8 is for checking numbers: its graph is the one that TensorRT compiles.
        graph, recipe = write_graph(job, job.directory, opset, fuses=precision != "fp8")
        return Artefacts(
            files=(graph, graph.with_name(DATA_FILE)),
            recipe=recipe,
            shapes=graph_shapes(graph),
            requires=_requires(opset, precision),
        )

    def write_scoring(self, job: BuildJob, prefix_ids: Sequence[int]) -> Artefacts:
        """See Target. The graph takes the keys and values of `prefix_ids`, which the runner computes once."""
        from deepseek_triton.builders.graph.decoder import ScoringMode
        from deepseek_triton.builders.targets.artefacts.graph import DATA_FILE, graph_shapes, write_graph

        if newest_opset() < SCORING_OPSET:
            raise BuildError("task score needs onnxruntime 1.24 or later; pip install 'onnxruntime>=1.24'")
        _check_fp8(job.options.precision)
        graph, recipe = write_graph(
            job, job.directory, SCORING_OPSET, ScoringMode(takes_prefix=True), fuses=job.options.precision != "fp8"
        )
        return Artefacts(
            files=(graph, graph.with_name(DATA_FILE)),
            recipe=recipe,
            shapes=graph_shapes(graph),
            engine={"prefix_ids": list(prefix_ids)},
            requires=_requires(SCORING_OPSET, job.options.precision),
        )


def newest_opset() -> int:
    """The newest opset that the installed ONNX Runtime runs; Python 3.10 has none later than 1.23.

    Raises:
        BuildError: it runs none.
    """
    installed = _installed()
    for opset, needed in ONNX_RUNTIME_FOR_OPSET.items():
        if installed >= needed:
            return opset
    raise BuildError(f"onnxruntime {package_version('onnxruntime')} is too old; pip install 'onnxruntime>=1.23'")


def _installed() -> tuple[int, ...]:
    return tuple(int(part) for part in package_version("onnxruntime").split(".")[:2])


def _check_fp8(precision: str) -> None:
    """Raise `BuildError` if the installed ONNX Runtime can't run the graph of this precision."""
    if precision == "fp8" and (_installed() < ONNX_RUNTIME_FOR_FP8 or _installed() == WITHOUT_FP8):
        raise BuildError(
            f"onnxruntime {package_version('onnxruntime')} can't run FP8; pip install 'onnxruntime>=1.25,!=1.29.*'"
        )


def _requires(opset: int, precision: str) -> dict[str, str]:
    lowest = ONNX_RUNTIME_FOR_OPSET[opset]
    if precision == "fp8":
        lowest = max(lowest, ONNX_RUNTIME_FOR_FP8)
    return {"onnxruntime": ".".join(map(str, lowest))}


TARGET = OnnxTarget()
