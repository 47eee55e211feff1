"""Checkpoint + Recipe + Calibration → FP8 graph: the float graph's builder asks a Quantizer for its weights."""

from __future__ import annotations

from pathlib import Path

from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.fp8.calibrate import Calibration, Report
from deepseek_triton.builders.fp8.quantizer import NETWORK, Quantizer
from deepseek_triton.builders.fp8.recipe import Recipe
from deepseek_triton.builders.fp8.sensitivity import keep_most_sensitive, measure_sensitivity
from deepseek_triton.builders.graph.builder import Progress
from deepseek_triton.builders.graph.cached import Logits
from deepseek_triton.builders.graph.decoder import ScoringMode, build_graph


def quantized_graph(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration,
    directory: Path,
    *,
    max_seq_len: int,
    network: str = NETWORK,
    opset: int = 24,
    logits: Logits = "last",
    scoring: ScoringMode | None = None,
    version: str = "",
    progress: Progress | None = None,
    report: Report = lambda what, done, total: None,
) -> tuple[Path, Recipe]:
    """Write the FP8 graph's `model.onnx` and `model.onnx.data` into `directory`: `build_graph` for FP8.

    Args:
        checkpoint: freshly opened: its digest afterwards is that of a float build.
        network: precision of everything that is not FP8, "fp16" or "fp32".
        progress: called with the number of bytes of weights just written.
        report: called with "quantize", the layers done and their number.

    Returns:
        The path of `model.onnx`, and the recipe with the layers kept by `extra_bytes` named in `keep`.

    Raises:
        CalibrationError: the calibration is not of this checkpoint, or its windows lead to NaN or infinity.
    """
    recipe = settled_recipe(checkpoint, recipe, calibration, network, report)
    quantizer = Quantizer(checkpoint, recipe, calibration, network=network, report=report)
    path = build_graph(
        checkpoint.spec, quantizer.read, directory,
        max_seq_len=max_seq_len, precision=network, quantized=quantizer.quantized,
        opset=opset, logits=logits, scoring=scoring, version=version, progress=progress,
    )  # fmt: skip
    return path, recipe


def settled_recipe(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration, network: str, report: Report
) -> Recipe:
    """The recipe with the layers kept by `extra_bytes` named in `keep`."""
    if not recipe.extra_bytes:
        return recipe
    ranking = measure_sensitivity(open_checkpoint(checkpoint.path), recipe, calibration, network, report)
    return keep_most_sensitive(checkpoint.spec, recipe, ranking, network)
