"""Checkpoint → the ONNX graph, quantised or not, that targets onnx, tensorrt and tensorrt-rtx begin with."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.recipe import DEFAULT_RECIPE, Activations, Recipe, recipe_named
from deepseek_triton.builders.graph.builder import Progress
from deepseek_triton.builders.graph.decoder import DTYPES, ScoringMode, build_graph
from deepseek_triton.builders.targets.artefacts.block_weights import BLOCK_PRECISIONS, BlockWeights
from deepseek_triton.builders.targets.artefacts.memory import BYTES_OF_WEIGHT
from deepseek_triton.ensemble.decoder.spec import ModelSpec

if TYPE_CHECKING:
    from deepseek_triton.builders.fp8.calibrate import Calibration
    from deepseek_triton.builders.fp8.journal import BuildJournal
    from deepseek_triton.builders.targets.artefacts.target import BuildJob

DATA_FILE = "model.onnx.data"  # a graph's weights, whatever the graph's own file is called
# A build's precision → that of what stays float in it: in an FP8 graph embedding, head, norms and cache.
NETWORK_OF = {"fp32": "fp32", "fp16": "fp16", "bf16": "fp16", "fp8": "fp16", **dict.fromkeys(BLOCK_PRECISIONS, "fp32")}


def write_graph(
    job: BuildJob, directory: Path, opset: int, scoring: ScoringMode | None = None, *, fuses: bool = False
) -> tuple[Path, Recipe | None]:
    """Write the graph into `directory`.

    scoring: for a graph without a cache that scores texts. fuses: as in `build_graph`.

    Returns:
        The graph's path, and for FP8 the recipe with every layer that stayed float.

    Raises:
        BuildError: the calibration failed, or the checkpoint stores no blocks of integers.
    """
    options, network, version = job.options, NETWORK_OF[job.options.precision], package_version("deepseek-triton")
    advance = weights_progress(job)
    if options.precision != "fp8":
        blocks = BlockWeights(job.checkpoint, options.precision) if options.precision in BLOCK_PRECISIONS else None
        path = build_graph(
            job.spec, blocks.read if blocks else job.checkpoint.read, directory,
            max_seq_len=job.max_seq_len, precision=network, quantized=blocks.quantized if blocks else None,
            opset=opset, scoring=scoring, version=version, progress=advance, fuses=fuses,
        )  # fmt: skip
        if blocks:
            size = (directory / DATA_FILE).stat().st_size
            job.report("weights", size, size)  # how much the blocks take is known only now
            job.say(blocks.describe())
        return path, None
    from deepseek_triton.builders.fp8.quantize import quantized_graph

    recipe = chosen_recipe(job)
    calibration, journal = calibrated(job, recipe)
    return quantized_graph(
        job.checkpoint, recipe, calibration, directory,
        max_seq_len=job.max_seq_len, network=network, opset=opset, scoring=scoring, version=version, progress=advance,
        report=job.report, journal=journal,
    )  # fmt: skip


def calibrated(job: BuildJob, recipe: Recipe) -> tuple[Calibration | None, BuildJournal | None]:
    """The calibration that a recipe needs, and the journal that keeps what was done; None where it needs none.

    The user is told of experts that saw few tokens, where that changes what the recipe does.
    """
    from deepseek_triton.builders.fp8.rounding.experts import describe_few
    from deepseek_triton.builders.fp8.texts.calibration_text import load_or_calibrate

    if not recipe.needs_calibration:
        return None, None
    options, journal = job.options, job.journal()
    calibration = load_or_calibrate(job.checkpoint, options.ranges, options.calibration_text, job.report, journal)
    if recipe.rounding == "compensated" and (line := describe_few(calibration)):
        job.say(line)
    return calibration, journal


def chosen_recipe(job: BuildJob, activations: Activations | None = None, *, takes_blocks: bool = False) -> Recipe:
    """What a checkpoint that is FP8 already has; for others the recipe that the options name.

    activations: those that the target has, where it hasn't both kinds and the checkpoint is FP8. takes_blocks: as in
        `stored_recipe`.

    Raises:
        BuildError: an option asks for other numbers than an FP8 checkpoint's.
    """
    from deepseek_triton.builders.fp8.stored import stored_recipe

    options = job.options
    stored = stored_recipe(job.checkpoint, options.keep, activations=activations, takes_blocks=takes_blocks)
    if stored is None:
        recipe = recipe_named(options.recipe or DEFAULT_RECIPE)
        return replace(recipe, keep=recipe.keep + options.keep)
    for name in (name for name in ("recipe", "ranges", "calibration_text") if getattr(options, name)):
        raise BuildError(
            f"{name} is for a checkpoint that this build quantises; {options.checkpoint} is FP8 already, and its "
            "codes and scales are taken over: leave the option out"
        )
    return stored


def fp8_modules(spec: ModelSpec, recipe: Recipe | None) -> list[str]:
    """The linear layers that the recipe has made FP8."""
    modules = (name.removesuffix(".weight") for name in spec.tensor_shapes() if name.endswith(".weight"))
    return [module for module in modules if recipe and recipe.precision_of(module) == "fp8"]


def graph_shapes(path: Path) -> dict[str, list[int | str]]:
    """The dimensions of each of the graph's inputs and outputs."""
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def weights_progress(job: BuildJob) -> Progress:
    """A callback that adds up written bytes and reports them as "weights"."""
    precision, done = job.options.precision, 0
    itemsize = BYTES_OF_WEIGHT[precision] if precision in BLOCK_PRECISIONS else DTYPES[NETWORK_OF[precision]].itemsize
    total = int((job.spec.num_parameters() + job.max_seq_len * job.spec.rotary_dim) * itemsize)

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        job.report("weights", min(done, total), total)

    return advance
