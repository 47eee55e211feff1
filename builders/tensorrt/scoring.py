"""Compile the scoring graph into a plan for Triton's own tensorrt backend.

One profile covers every batch up to the limits, so the plan can run any batch that the dynamic batcher forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_triton.builders.tensorrt.census import Census
from deepseek_triton.builders.tensorrt.compile import CompileJob, compile_graph, read_graph
from deepseek_triton.builders.tensorrt.compiler import resolve_target
from deepseek_triton.builders.tensorrt.errors import EngineError
from deepseek_triton.builders.tensorrt.network import STATELESS_FORMS, RaggedProfile
from deepseek_triton.builders.tensorrt.progress import CompileProgress
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically
from deepseek_triton.ensemble.protocol.contract import LOGIT_POSITIONS, SCORE_ROW, TARGET_IDS, TARGET_LOGITS
from deepseek_triton.ensemble.scoring.rows import LOGIT_COUNTS, LONGEST_ROW, ROW_LENS, TARGET_COUNTS


@dataclass(frozen=True)
class ScoringLimits:
    """The largest input of a scoring plan.

    max_batch_size: rows in one pass. max_seq_len: tokens in each, and for each no more targets than that.
    """

    max_batch_size: int
    max_seq_len: int

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name} is {getattr(self, name)}, must be at least 1")

    def profile(self) -> RaggedProfile:
        """The plan's one profile, best for a full batch of rows of a quarter of max_seq_len with two labels each."""
        batch, seq_len = self.max_batch_size, self.max_seq_len
        best = max(1, seq_len // 4)
        sizes = {name.name: (1, batch * best, batch * seq_len) for name in SCORE_ROW}
        sizes[LOGIT_POSITIONS.name] = (1, batch, batch * seq_len)
        for spec in (TARGET_LOGITS, TARGET_IDS):
            sizes[spec.name] = (1, 2 * batch, batch * seq_len)
        sizes |= {name: (1, batch, batch) for name in (ROW_LENS, LOGIT_COUNTS, TARGET_COUNTS)}
        return RaggedProfile("scoring", sizes | {LONGEST_ROW: (1, best, seq_len)})


@dataclass(frozen=True)
class ScoringReport:
    """The plan that was built: its file and length in bytes, and the network's census."""

    path: Path
    census: Census
    plan_bytes: int
    version: str
    compute_capability: str


def build_scoring_engine(
    graph_path: Path,
    output_path: Path,
    limits: ScoringLimits,
    *,
    target: str,
    precision: str,
    compute_capability: str | None = None,
    fp8_modules: Sequence[str] = (),
    timing_cache: Path | None = None,
    optimization_level: int | None = None,
    progress: CompileProgress | None = None,
) -> ScoringReport:
    """Compile a graph that `build_graph` wrote for scoring; the arguments are build_engine's.

    Raises:
        EngineError: with one line; nothing was written.
    """
    settled = resolve_target(target, precision, compute_capability)
    model = read_graph(graph_path)
    positions = next(tensor.dims[0] for tensor in model.graph.initializer if tensor.name == "rope.cos")
    if limits.max_seq_len > positions:
        raise EngineError(f"max_seq_len is {limits.max_seq_len}, the graph has {positions} positions")
    compiled = compile_graph(
        CompileJob(
            settled, model, graph_path, precision, (limits.profile(),), STATELESS_FORMS[precision],
            fp8_modules=fp8_modules, timing_cache=timing_cache,
            optimization_level=optimization_level, progress=progress,
        )
    )  # fmt: skip
    write_atomically(output_path, compiled.plan, EngineError)
    size = output_path.stat().st_size
    return ScoringReport(output_path, compiled.census, size, settled.version, settled.compute_capability)
