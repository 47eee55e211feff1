"""Checkpoint + Recipe + Calibration → FP8 graph. The builder of the float graph reads its weights from a Quantizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek_triton.builders.checkpoint.read_ahead import TensorPrefetch
from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.fp8.calibrate import Calibration, CalibrationError, Report
from deepseek_triton.builders.fp8.journal import BuildJournal
from deepseek_triton.builders.fp8.quality.sensitivity import keep_most_sensitive, measure_sensitivity
from deepseek_triton.builders.fp8.quantizer import NETWORK, Quantizer
from deepseek_triton.builders.fp8.recipe import Recipe
from deepseek_triton.builders.fp8.stored import StoredLinears
from deepseek_triton.builders.fp8.weight_quantizer import WeightQuantizer
from deepseek_triton.builders.graph.builder import Progress
from deepseek_triton.builders.graph.decoder import DTYPES, ScoringMode, build_graph
from deepseek_triton.builders.graph.forms.cached import Logits


def quantized_graph(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
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
    journal: BuildJournal | None = None,
) -> tuple[Path, Recipe]:
    """Write the FP8 graph's `model.onnx` and `model.onnx.data` into `directory`, as `build_graph` does for floats.

    Args:
        checkpoint: freshly opened. Its digest afterwards is that of a float build.
        calibration: None where the recipe needs none.
        network: precision of everything that isn't FP8, "fp16" or "fp32".
        progress: called with the number of bytes of weights just written.
        report: called with "quantize", the layers done and their number.
        journal: keeps the layers that are done, should the build be killed.

    Returns:
        The path of `model.onnx`, and the recipe with `extra_bytes` replaced by the layers' names in `keep`.

    Raises:
        CalibrationError: the calibration belongs to another checkpoint, or its windows lead to NaN or infinity.
    """
    recipe = settled_recipe(checkpoint, recipe, calibration, network, report)
    with quantizing(checkpoint, recipe, calibration, network=network, report=report, journal=journal) as quantizer:
        path = build_graph(
            checkpoint.spec, quantizer.read, directory,
            max_seq_len=max_seq_len, precision=network, quantized=quantizer.quantized,
            opset=opset, logits=logits, scoring=scoring, version=version, progress=progress,
        )  # fmt: skip
    return path, recipe


@contextmanager
def quantizing(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
    *,
    network: str = NETWORK,
    report: Report = lambda what, done, total: None,
    journal: BuildJournal | None = None,
) -> Iterator[Quantizer | WeightQuantizer | StoredLinears]:
    """What carries the recipe out, while its weights are asked for in the builder's order.

    Raises:
        CalibrationError: the recipe needs a calibration and there is none, or it belongs to another checkpoint.
    """
    if recipe.rounding == "stored":
        yield StoredLinears(checkpoint, recipe, DTYPES[network])
        return
    if recipe.needs_calibration and calibration is None:
        raise CalibrationError("the recipe needs a calibration")
    with TensorPrefetch(checkpoint.read, list(checkpoint.spec.tensor_shapes())) as ahead:
        if calibration is not None and recipe.needs_calibration:
            section = (journal or BuildJournal()).section(
                "quantize", recipe=recipe.to_dict(), network=network, calibration=calibration.digest()
            )
            yield Quantizer(
                checkpoint, recipe, calibration,
                network=network, report=report, read=ahead.read, section=section,
            )  # fmt: skip
        else:
            yield WeightQuantizer(checkpoint.spec, recipe, ahead.read, network=network, report=report)


def settled_recipe(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration | None, network: str, report: Report
) -> Recipe:
    """The recipe with `extra_bytes` replaced by the names of the layers that it has room for, in `keep`."""
    if not recipe.extra_bytes or calibration is None:
        return recipe
    ranking = measure_sensitivity(checkpoint.reopened(), recipe, calibration, network, report)
    return keep_most_sensitive(checkpoint.spec, recipe, ranking, network)
