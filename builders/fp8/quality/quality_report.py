"""Evaluate an artefact or a recipe against the float checkpoint on a text file: options in, table, JSON and plot out.

evaluate.py computes the numbers; commands/evaluate.py is the command `deepseek-triton evaluate`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.fp8.quality.evaluate import (
    FloatSource,
    ModuleError,
    Quality,
    compare,
    module_errors,
    run_model,
    text_windows,
)
from deepseek_triton.builders.fp8.quality.graph_weights import Artefact
from deepseek_triton.builders.fp8.quantize import quantized_graph
from deepseek_triton.builders.fp8.recipe import RECIPES, Recipe
from deepseek_triton.builders.fp8.stored import stored_recipe
from deepseek_triton.builders.fp8.texts.calibration_text import load_or_calibrate, load_tokenizer, read_text
from deepseek_triton.extras import install_command

TABLE_TOKENS = 256  # tokens of the text that the table of layers is measured on


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate.

    artefact: model.onnx or its directory. None: quantise `checkpoint` by `recipe` first.
    num_tokens: predicted tokens in all. window_len: tokens in a window.
    """

    checkpoint: Path
    text: Path
    artefact: Path | None = None
    recipe: Recipe = RECIPES["default"]
    ranges: Path | None = None
    num_tokens: int = 8176
    window_len: int = 512

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise BuildError(f"tokens is {self.num_tokens}, must be positive")
        if self.window_len < 2:
            raise BuildError(f"window is {self.window_len}, must be at least 2")


@dataclass(frozen=True)
class Evaluation:
    """The quality, the bytes of both models, and each linear layer's error."""

    text: str
    quality: Quality
    float_bytes: int
    artefact_bytes: int
    modules: tuple[ModuleError, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as quality.json has them."""
        return asdict(self)

    def table(self, worst: int = 8) -> str:
        """The result as text, with the `worst` layers that have the largest own error."""
        q = self.quality
        lines = [
            f"text              {self.text}, {q.num_tokens} tokens predicted",
            f"perplexity        {q.float_perplexity:.3f} float, {q.perplexity:.3f} here: x {q.perplexity_ratio:.4f}",
            f"accuracy          {q.float_accuracy:.4f} float, {q.accuracy:.4f} here: {_kept(q)} kept",
            f"top-1 agreement   {q.agreement:.2%}",
            f"KL divergence     {q.mean_kl:.5f} mean, {q.p99_kl:.4f} 99th percentile, {q.worst_kl:.3f} worst (nats)",
            f"bytes             {self.float_bytes:,} float32, {self.artefact_bytes:,} here: "
            f"x {self.artefact_bytes / self.float_bytes:.4f}",
            "",
            f"{'module (largest own errors)':44} {'precision':9} {'bytes':>11} {'own':>8} {'in all':>8}",
        ]
        for error in sorted(self.modules, key=lambda e: -e.own)[:worst]:
            lines.append(
                f"{error.module:44} {error.precision:9} {error.num_bytes:11,} {error.own:8.4f} {error.accumulated:8.4f}"
            )
        return "\n".join(lines)

    def save(self, directory: Path) -> None:
        """Write quality.json and quality.png.

        Raises:
            BuildError: a file can't be written, or matplotlib isn't installed.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.to_dict(), indent=1) + "\n"
            (directory / "quality.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise BuildError(f"{error.filename or directory}: {error.strerror}") from error
        plot(self, directory / "quality.png")


def evaluate(options: EvaluateOptions, report: Report = lambda what, done, total: None) -> Evaluation:
    """Evaluate an artefact, or the one that a recipe makes, against the float checkpoint.

    Raises:
        BuildError: a file is missing or unusable, the text is too short, or the artefact was built from another
            checkpoint.
    """
    checkpoint = open_checkpoint(options.checkpoint)
    spec = checkpoint.spec
    ids = load_tokenizer(checkpoint).encode(read_text(options.text))
    windows = text_windows(ids, options.window_len, options.num_tokens, spec.vocab_size)
    with tempfile.TemporaryDirectory(prefix="deepseek-triton-evaluate-") as directory:
        path = options.artefact or _quantise(options, Path(directory), report)
        artefact = Artefact(path / "model.onnx" if path.is_dir() else path)
        artefact.check(spec)
        reference = run_model(FloatSource(checkpoint), spec, windows, report)
        quality = compare(reference, run_model(artefact, spec, windows, report), windows)
        errors = module_errors(FloatSource(checkpoint), artefact, spec, windows[0][:TABLE_TOKENS])
        return Evaluation(options.text.name, quality, spec.num_parameters() * 4, artefact.num_bytes, tuple(errors))


def _quantise(options: EvaluateOptions, directory: Path, report: Report) -> Path:
    checkpoint = open_checkpoint(options.checkpoint)
    recipe, calibration = stored_recipe(checkpoint) or options.recipe, None
    if recipe.needs_calibration:
        calibration = load_or_calibrate(checkpoint, options.ranges, None, report)
    path, _ = quantized_graph(checkpoint, recipe, calibration, directory, max_seq_len=options.window_len, report=report)
    return path


def _kept(quality: Quality) -> str:
    return "nothing to be" if quality.accuracy_kept is None else f"{quality.accuracy_kept:.2%}"


def plot(evaluation: Evaluation, path: Path) -> None:
    """Write a PNG with each layer's own and accumulated error and the bytes of both models."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise BuildError(f"matplotlib is not installed; run: {install_command('plot')}") from error
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    layers, size = figure.subplots(1, 2, width_ratios=[4, 1])
    kinds = list(dict.fromkeys(e.module.split(".", 3)[3] for e in evaluation.modules))
    for i, kind in enumerate(kinds):
        errors = [e for e in evaluation.modules if e.module.endswith(kind)]
        positions = [int(e.module.split(".")[2]) for e in errors]
        layers.plot(positions, [e.own for e in errors], color=f"C{i}", marker="o", markersize=3, label=kind)
        layers.plot(positions, [e.accumulated for e in errors], color=f"C{i}", linestyle=":")
    layers.set(xlabel="layer", ylabel="relative output error (solid: own, dotted: accumulated)")
    layers.set_ylim(bottom=0)
    layers.legend(fontsize="small")
    q = evaluation.quality
    layers.set_title(
        f"{evaluation.text}: perplexity x {q.perplexity_ratio:.4f}, accuracy kept {_kept(q)}, "
        f"KL {q.mean_kl:.4f}", fontsize="medium",
    )  # fmt: skip
    sizes = (evaluation.float_bytes / 1e6, evaluation.artefact_bytes / 1e6)
    size.bar_label(size.bar(["float32", "artefact"], sizes, color=["0.6", "C0"]), fmt="%.0f")
    size.set(ylabel="megabytes")
    try:
        figure.savefig(path, dpi=110, metadata={"Software": None})
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}") from error
