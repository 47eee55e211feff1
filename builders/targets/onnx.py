"""Target onnx: ONNX Runtime on a CPU runs the graph as it is."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets.artefacts.memory import ServingMemory, host_memory, host_memory_bytes
from deepseek_triton.builders.targets.artefacts.onnx_runtime import (
    SCORING_OPSET,
    check_fp8,
    newest_opset,
    required_packages,
)
from deepseek_triton.builders.targets.artefacts.target import Artefacts, BuildJob, CacheBudget, Target
from deepseek_triton.ensemble.decoder.architectures import PARTS
from deepseek_triton.ensemble.protocol.settings import EngineSettings

CACHE_SHARE = 8  # default caches take at most an eighth of the host's memory
# A default: longer texts take minutes on a few cores, and who has them says so.
MAX_TOKENS = 8192


class OnnxTarget(Target):
    """Writes model.onnx and its weights."""

    name = "onnx"
    precisions = ("fp32", "fp16", "int4", "int8", "stored", "fp8")
    tasks = ("generate", "score")
    parts = PARTS
    quantized_parts = PARTS
    indexed_tasks = ("generate",)
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
        check_fp8(precision)
        # FP8 is for checking numbers: its graph is the one that TensorRT compiles.
        graph, recipe = write_graph(job, job.directory, opset, fuses=precision != "fp8")
        return Artefacts(
            files=(graph, graph.with_name(DATA_FILE)),
            recipe=recipe,
            shapes=graph_shapes(graph),
            requires=required_packages(opset, precision),
        )

    def write_scoring(self, job: BuildJob, prefix_ids: Sequence[int]) -> Artefacts:
        """See Target. The graph takes the keys and values of `prefix_ids`, which the runner computes once."""
        from deepseek_triton.builders.graph.decoder import ScoringMode
        from deepseek_triton.builders.targets.artefacts.graph import DATA_FILE, graph_shapes, write_graph

        if newest_opset() < SCORING_OPSET:
            raise BuildError("task score needs onnxruntime 1.24 or later; pip install 'onnxruntime>=1.24'")
        check_fp8(job.options.precision)
        graph, recipe = write_graph(
            job, job.directory, SCORING_OPSET, ScoringMode(takes_prefix=True), fuses=job.options.precision != "fp8"
        )
        return Artefacts(
            files=(graph, graph.with_name(DATA_FILE)),
            recipe=recipe,
            shapes=graph_shapes(graph),
            engine={"prefix_ids": list(prefix_ids)},
            requires=required_packages(SCORING_OPSET, job.options.precision),
        )


TARGET = OnnxTarget()
