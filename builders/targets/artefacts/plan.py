"""What targets tensorrt and tensorrt-rtx share: both compile the ONNX graph into a plan and keep the plan alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_triton.builders.targets.artefacts.target import Artefacts, BuildJob, CacheBudget, Target
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.tensorrt_api import PLAN_FILE
from deepseek_triton.ensemble.protocol.settings import EngineSettings

if TYPE_CHECKING:
    from deepseek_triton.builders.fp8.recipe import Recipe
    from deepseek_triton.builders.repository.options import BuildOptions
    from deepseek_triton.ensemble.decoder.spec import ModelSpec

OPSET = 24
CACHE_BYTES = 8 * 2**30  # of the serving GPU, which need not be here


class TensorRTTarget(Target):
    """Writes model.plan; the graph exists only while it is compiled."""

    precisions = ("fp16", "fp32", "fp8")
    is_compiled = True
    why_not = (
        ": TensorRT has no layer for latent attention, one for experts on compute capability 10.0, 10.3 and 11.0 "
        "alone, and the graph's loop over the chosen experts isn't compiled"
    )
    scores_with_plan = True
    compiled_settings = ("max_num_seqs", "max_num_batched_tokens", "max_batch_size")

    def cache_budget(self) -> CacheBudget:
        """See Target."""
        return CacheBudget(CACHE_BYTES, EngineSettings.max_num_seqs, "what the GPU is expected to have free for it")

    def disk_bytes(self, options: BuildOptions, spec: ModelSpec) -> int:
        """See Target: the graph, while it is compiled, and the plan."""
        return 2 * super().disk_bytes(options, spec)

    def preflight(self, options: BuildOptions, spec: ModelSpec, directory: Path) -> None:
        """See Target."""
        from deepseek_triton.builders.tensorrt.compiler import resolve_target

        resolve_target(self.name, options.precision, options.compute_capability)
        super().preflight(options, spec, directory)

    def write(self, job: BuildJob, settings: EngineSettings) -> Artefacts:
        """See Target."""
        from deepseek_triton.builders.targets.artefacts.graph import graph_shapes, write_graph
        from deepseek_triton.builders.tensorrt.build import build_engine

        with tempfile.TemporaryDirectory(prefix="graph-", dir=job.directory.parent) as temporary:
            graph, recipe = write_graph(job, Path(temporary), OPSET)
            built = build_engine(
                graph, job.directory / PLAN_FILE,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_seq_len=job.max_seq_len,
                **self._compile_options(job, recipe),
            )  # fmt: skip
            engine = built.plan.to_dict() | {"census": built.census.to_dict()}
            return Artefacts((built.path,), recipe, graph_shapes(graph), engine)

    def write_scoring(self, job: BuildJob, prefix_ids: Sequence[int]) -> Artefacts:
        """See Target. A plan computes `prefix_ids` anew for each prompt."""
        from deepseek_triton.builders.graph.decoder import ScoringMode
        from deepseek_triton.builders.targets.artefacts.graph import graph_shapes, write_graph
        from deepseek_triton.builders.tensorrt.scoring import ScoringLimits, build_scoring_engine

        limits = ScoringLimits(job.options.scoring.batching.max_batch_size, job.max_seq_len)
        with tempfile.TemporaryDirectory(prefix="graph-", dir=job.directory.parent) as temporary:
            graph, recipe = write_graph(job, Path(temporary), OPSET, ScoringMode(takes_prefix=False))
            built = build_scoring_engine(
                graph, job.directory / PLAN_FILE, limits, **self._compile_options(job, recipe)
            )  # fmt: skip
            engine: dict[str, Any] = {"version": built.version, "compute_capability": built.compute_capability}
            engine |= {"max_batch_size": limits.max_batch_size, "census": built.census.to_dict()}
            return Artefacts((built.path,), recipe, graph_shapes(graph), engine)

    def check(self, manifest: Manifest, settings: EngineSettings) -> Iterator[str]:
        """See Target: the settings must fit the plan's profiles too."""
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            value, limit = getattr(settings, name), manifest.engine.get(name)
            if limit is not None and value > limit:
                yield f"{name} is {value}, the plan was built for {limit}: lower it"
        yield from super().check(manifest, settings)

    def _compile_options(self, job: BuildJob, recipe: Recipe | None) -> dict[str, Any]:
        from deepseek_triton.builders.targets.artefacts.graph import fp8_modules

        return {
            "target": self.name,
            "precision": job.options.precision,
            "compute_capability": job.options.compute_capability,
            "fp8_modules": fp8_modules(job.spec, recipe),
            "timing_cache": job.options.timing_cache,
            "optimization_level": job.options.builder_optimization_level,
            "progress": job.report,
        }
