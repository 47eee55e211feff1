"""What pruning costs and saves: each candidate beside its parent on held-out text, as a table, JSON and a plot.

Both run layer by layer in float32 (`builders/fp8/quality/evaluate.py`); tokens/s is the float graph's on this machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.fp8.quality.evaluate import FloatSource, Quality, compare, run_model, text_windows
from deepseek_triton.builders.fp8.texts.calibration_text import load_tokenizer, read_text
from deepseek_triton.builders.fp8.texts.generated_text import PROMPT_LEN, fits_in_memory, generate_windows
from deepseek_triton.extras import install_command

TIMED_TOKENS = 48
HEAD = (
    "| | parameters removed | perplexity | × parent's | accuracy kept | top-1 agreement | mean KL | MB | tokens/s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class MeasuredModel:
    """One candidate. removed: of the parent's parameters. num_bytes: of its weights as they are stored. tokens_per_s:
    of one sequence; None: not measured."""

    name: str
    removed: float
    num_bytes: int
    tokens_per_s: float | None
    quality: Quality

    def line(self) -> str:
        """As a row of the table."""
        q = self.quality
        kept = "-" if q.accuracy_kept is None else f"{q.accuracy_kept:.2%}"
        speed = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f}"
        numbers = (
            f"{self.removed:.1%}", f"{q.perplexity:.5g}", f"{q.perplexity_ratio:.4g}", kept, f"{q.agreement:.2%}",
            f"{q.mean_kl:.4f}", f"{self.num_bytes / 1e6:.1f}", speed,
        )  # fmt: skip
        return f"| {self.name} | {' | '.join(numbers)} |"


@dataclass(frozen=True)
class PruningReport:
    """The parent, and what came of it. text: the name of the held-out text."""

    text: str
    parent: MeasuredModel
    rows: tuple[MeasuredModel, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def table(self) -> str:
        """Markdown."""
        return "\n".join([HEAD, *(row.line() for row in (self.parent, *self.rows))])

    def save(self, directory: Path, name: str = "pruning") -> None:
        """Write NAME.md, NAME.json and NAME.png.

        Raises:
            BuildError: a file can't be written, or matplotlib isn't installed.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{name}.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            head = f"{self.text}, {self.parent.quality.num_tokens} tokens predicted"
            (directory / f"{name}.md").write_text(f"{head}\n\n{self.table()}\n", encoding="utf-8")
        except OSError as error:
            raise BuildError(f"{error.filename or directory}: {error.strerror}") from error
        plot(self, directory / f"{name}.png")


def measure(
    parent: Path,
    candidates: Mapping[str, Path],
    text: Path,
    *,
    num_tokens: int = 8176,
    window_len: int = 512,
    is_timed: bool = True,
    report: Report = lambda what, done, total: None,
) -> PruningReport:
    """Measure the checkpoints of `candidates`, name → path, beside their parent.

    Raises:
        BuildError: a checkpoint or the text can't be used, or a candidate has other tokens than the parent.
    """
    checkpoint = open_checkpoint(parent)
    spec = checkpoint.spec
    ids = load_tokenizer(checkpoint).encode(read_text(text))
    windows = text_windows(ids, window_len, num_tokens, spec.vocab_size)
    reference = run_model(FloatSource(checkpoint), spec, windows, report)

    def row(name: str, source: Checkpoint, final: Any) -> MeasuredModel:
        return MeasuredModel(
            name,
            1 - source.spec.num_parameters() / spec.num_parameters(),
            stored_bytes(source),
            tokens_per_s(source, ids) if is_timed else None,
            compare(reference, final, windows),
        )

    rows = []
    own = row("parent", checkpoint, reference)
    for name, path in candidates.items():
        candidate = open_checkpoint(path)
        if candidate.spec.vocab_size != spec.vocab_size:
            raise BuildError(f"{path} has {candidate.spec.vocab_size} tokens, its parent {spec.vocab_size}")
        rows.append(row(name, candidate, run_model(FloatSource(candidate), candidate.spec, windows, report)))
    return PruningReport(text.name, own, tuple(rows))


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the files that hold the weights."""
    path = checkpoint.path
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def tokens_per_s(checkpoint: Checkpoint, ids: Sequence[int] | np.ndarray[Any, Any]) -> float | None:
    """Tokens a second of one sequence in float32; None where the model doesn't fit into memory.

    ids: a prompt, of which the beginning is used.
    """
    if not fits_in_memory(checkpoint.spec):
        return None
    moments: list[float] = []
    generate_windows(
        checkpoint.reopened(),
        [np.asarray(ids[:PROMPT_LEN], np.int64)],
        num_tokens=min(TIMED_TOKENS, checkpoint.spec.max_seq_len - PROMPT_LEN),
        report=lambda what, done, total: moments.append(time.perf_counter()),
    )
    if len(moments) < 3:
        return None
    return (len(moments) - 2) / (moments[-1] - moments[1])


def plot(report: PruningReport, path: Path) -> None:
    """Write a PNG: perplexity and top-1 agreement over the share of parameters that was removed.

    Candidates whose names differ in a leading "NUMBER % " alone are one line.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise BuildError(f"matplotlib is not installed; run: {install_command('plot')}") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[str, list[MeasuredModel]] = {}
    for row in report.rows:
        lines.setdefault(row.name.partition(" % ")[2] or row.name, []).append(row)
    for name, rows in lines.items():
        ordered = [report.parent, *sorted(rows, key=lambda row: row.removed)]
        removed = [100 * row.removed for row in ordered]
        left.plot(removed, [row.quality.perplexity for row in ordered], marker="o", label=name)
        right.plot(removed, [100 * row.quality.agreement for row in ordered], marker="o", label=name)
    left.set(xlabel="parameters removed, %", ylabel="perplexity", yscale="log")
    right.set(xlabel="parameters removed, %", ylabel="top-1 agreement with the parent, %")
    if lines:
        left.legend(fontsize="small")
    left.set_title(f"{report.text}, {report.parent.quality.num_tokens} tokens", fontsize="medium")
    try:
        figure.savefig(path, dpi=110, metadata={"Software": None})
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}") from error
