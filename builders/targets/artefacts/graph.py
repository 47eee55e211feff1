"""Checkpoint → the ONNX graph, quantised or not, that targets onnx, tensorrt and tensorrt-rtx begin with."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from deepseek_triton.builders.fp8.recipe import Recipe, recipe_named
from deepseek_triton.builders.graph.builder import Progress
from deepseek_triton.builders.graph.decoder import DTYPES, ScoringMode, build_graph
from deepseek_triton.ensemble.decoder.spec import ModelSpec

if TYPE_CHECKING:
    from deepseek_triton.builders.repository.options import BuildOptions
    from deepseek_triton.builders.targets.artefacts.target import BuildJob

# A build's precision → that of what stays float in it: in an FP8 graph embedding, head, norms and cache.
NETWORK_OF = {"fp32": "fp32", "fp16": "fp16", "bf16": "fp16", "fp8": "fp16"}


def write_graph(
    job: BuildJob, directory: Path, opset: int, scoring: ScoringMode | None = None
) -> tuple[Path, Recipe | None]:
    """Write the graph into `directory`.

    scoring: for a graph without a cache that scores texts.

    Returns:
        The graph's path, and for FP8 the recipe with every layer that stayed float.

    Raises:
        BuildError: the calibration failed.
    """
    options, network, version = job.options, NETWORK_OF[job.options.precision], package_version("deepseek-triton")
    advance = weights_progress(job)
    if options.precision != "fp8":
        path = build_graph(
            job.spec, job.checkpoint.read, directory,
            max_seq_len=job.max_seq_len, precision=network, opset=opset, scoring=scoring, version=version,
            progress=advance,
        )  # fmt: skip
        return path, None
    from deepseek_triton.builders.fp8.calibration_text import load_or_calibrate
    from deepseek_triton.builders.fp8.quantize import quantized_graph

    calibration = load_or_calibrate(options.checkpoint, options.ranges, options.calibration_text, job.report)
    return quantized_graph(
        job.checkpoint, chosen_recipe(options), calibration, directory,
        max_seq_len=job.max_seq_len, network=network, opset=opset, scoring=scoring, version=version, progress=advance,
        report=job.report,
    )  # fmt: skip


def chosen_recipe(options: BuildOptions) -> Recipe:
    """The recipe that the options name, with the modules that they keep."""
    recipe = recipe_named(options.recipe)
    return replace(recipe, keep=recipe.keep + options.keep)


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
    itemsize = DTYPES[NETWORK_OF[job.options.precision]].itemsize
    total = (job.spec.num_parameters() + job.max_seq_len * job.spec.head_dim) * itemsize
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        job.report("weights", done, total)

    return advance
