"""Checkpoint → an engine's version directory: the graph or the plan, and the manifest that says what it is.

One path for every target: the ONNX graph is always made; for TensorRT it is then compiled, and only the plan is kept.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import onnx

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.recipe import Recipe, recipe_named
from deepseek_triton.builders.graph.builder import Progress
from deepseek_triton.builders.graph.decoder import DTYPES, ScoringMode, build_graph
from deepseek_triton.builders.repository.options import BuildOptions, Report
from deepseek_triton.ensemble.artefacts.manifest import ArtefactFile, Manifest, installed_versions
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.protocol.settings import EngineSettings

PACKAGES = ("deepseek-triton", "numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx", "tokenizers")
# opset → the first ONNX Runtime that runs every operator of the graph in it
ONNX_RUNTIME_FOR_OPSET = {24: (1, 24), 23: (1, 23)}
TENSORRT_OPSET = SCORING_OPSET = 24
# What is not FP8 in an FP8 graph: embedding, head, norms and cache.
NETWORK_OF = {"fp32": "fp32", "fp16": "fp16", "bf16": "fp16", "fp8": "fp16"}


def write_artefacts(
    checkpoint: Checkpoint,
    options: BuildOptions,
    settings: EngineSettings,
    max_seq_len: int,
    directory: Path,
    report: Report,
) -> None:
    """Write the artefacts of `options.target` and manifest.json into `directory`.

    Raises:
        BuildError: no room, no ONNX Runtime or TensorRT that fits, calibration or compilation failed.
    """
    spec = checkpoint.spec
    _require_means(spec, options, directory)
    files: tuple[Path, ...]
    engine: dict[str, Any] = {}
    requires: dict[str, str] = {}
    recipe: Recipe | None
    if options.target == "cuda":
        weights, recipe, engine = _write_weights(checkpoint, options, max_seq_len, directory, report)
        files, shapes = (weights,), {}
    elif options.target == "onnx":
        opset = _onnx_opset()
        graph, recipe = _write_graph(checkpoint, options, max_seq_len, opset, directory, report)
        files, shapes = (graph, graph.with_name(graph.name + ".data")), _shapes(graph)
        requires = {"onnxruntime": ".".join(map(str, ONNX_RUNTIME_FOR_OPSET[opset]))}
    else:
        with tempfile.TemporaryDirectory(prefix="graph-", dir=directory.parent) as temporary:
            graph, recipe = _write_graph(checkpoint, options, max_seq_len, TENSORRT_OPSET, Path(temporary), report)
            plan, engine = _compile(graph, spec, options, settings, recipe, max_seq_len, directory, report)
            files, shapes = (plan,), _shapes(graph)
    manifest = _manifest(checkpoint, options, max_seq_len, recipe, engine, files, shapes)
    replace(manifest, requires=requires).save(directory)


def write_scoring_artefacts(
    checkpoint: Checkpoint,
    options: BuildOptions,
    max_seq_len: int,
    directory: Path,
    report: Report,
    prefix_ids: Sequence[int] = (),
) -> int:
    """Write a stateless engine and its manifest.json into `directory`; returns the width of its hidden state.

    prefix_ids: what the template's prompts begin with; a plan computes it for each anew.

    Raises:
        BuildError: as `write_artefacts`.
    """
    spec = checkpoint.spec
    _require_means(spec, options, directory)
    engine: dict[str, Any] = {}
    requires: dict[str, str] = {}
    files: tuple[Path, ...]
    with contextlib.ExitStack() as stack:
        place = directory
        if options.target == "onnx":
            requires = {"onnxruntime": ".".join(map(str, ONNX_RUNTIME_FOR_OPSET[_scoring_opset()]))}
        else:
            temporary = tempfile.TemporaryDirectory(prefix="graph-", dir=directory.parent)
            place = Path(stack.enter_context(temporary))
        mode = ScoringMode(takes_prefix=options.target == "onnx")
        graph, recipe = _write_graph(checkpoint, options, max_seq_len, SCORING_OPSET, place, report, mode)
        shapes = _shapes(graph)
        if options.target == "onnx":
            files = (graph, graph.with_name("model.onnx.data"))
            engine = {"prefix_ids": list(prefix_ids)}
        else:
            plan, engine = _compile_scoring(graph, spec, options, recipe, max_seq_len, directory, report)
            files = (plan,)
    manifest = _manifest(checkpoint, options, max_seq_len, recipe, engine, files, shapes)
    replace(manifest, requires=requires).save(directory)
    return spec.hidden_size


def _compile_scoring(
    stateless: Path,
    spec: ModelSpec,
    options: BuildOptions,
    recipe: Recipe | None,
    max_seq_len: int,
    directory: Path,
    report: Report,
) -> tuple[Path, dict[str, Any]]:
    """The plan's path, and what the manifest says of it."""
    from deepseek_triton.builders.tensorrt.scoring import ScoringLimits, build_scoring_engine
    from deepseek_triton.ensemble.artefacts.tensorrt_api import PLAN_FILE

    limits = ScoringLimits(options.scoring.batching.max_batch_size, max_seq_len)
    built = build_scoring_engine(
        stateless, directory / PLAN_FILE, limits,
        target=options.target,
        precision=options.precision,
        compute_capability=options.compute_capability,
        fp8_modules=_fp8_modules(spec, recipe),
        timing_cache=options.timing_cache,
        progress=report,
    )  # fmt: skip
    engine: dict[str, Any] = {"version": built.version, "compute_capability": built.compute_capability}
    engine |= {"max_batch_size": limits.max_batch_size, "census": built.census.to_dict()}
    return built.path, engine


def _scoring_opset() -> int:
    if _onnx_opset() < SCORING_OPSET:
        raise BuildError("task score needs onnxruntime 1.24 or later; pip install 'onnxruntime>=1.24'")
    return SCORING_OPSET


def _manifest(
    checkpoint: Checkpoint,
    options: BuildOptions,
    max_seq_len: int,
    recipe: Recipe | None,
    engine: dict[str, Any],
    files: tuple[Path, ...],
    shapes: dict[str, list[int | str]],
) -> Manifest:
    return Manifest(
        name=options.name,
        target=options.target,
        precision=options.precision,
        checkpoint=checkpoint.path.name,
        checkpoint_sha256=checkpoint.digest(),
        spec=checkpoint.spec.to_dict(),
        limits={"max_seq_len": max_seq_len},
        end_ids=checkpoint.spec.eos_token_ids,
        shapes=shapes,
        versions=installed_versions(PACKAGES),
        requires={},
        files={file.name: ArtefactFile.of(file) for file in files},
        command=options.command(),
        recipe=recipe.to_dict() if recipe else {},
        engine=engine,
    )


def _fp8_modules(spec: ModelSpec, recipe: Recipe | None) -> list[str]:
    """Linear layers that must be FP8, by the recipe that was carried out."""
    modules = (name.removesuffix(".weight") for name in spec.tensor_shapes() if name.endswith(".weight"))
    return [module for module in modules if recipe and recipe.precision_of(module) == "fp8"]


def _write_graph(
    checkpoint: Checkpoint,
    options: BuildOptions,
    max_seq_len: int,
    opset: int,
    directory: Path,
    report: Report,
    scoring: ScoringMode | None = None,
) -> tuple[Path, Recipe | None]:
    """The ONNX graph, and for FP8 the recipe with every kept layer named."""
    network, version = NETWORK_OF[options.precision], package_version("deepseek-triton")
    advance = _weights_progress(checkpoint.spec, options.precision, max_seq_len, report)
    if options.precision != "fp8":
        path = build_graph(
            checkpoint.spec, checkpoint.read, directory,
            max_seq_len=max_seq_len, precision=network, opset=opset, scoring=scoring, version=version, progress=advance,
        )  # fmt: skip
        return path, None
    from deepseek_triton.builders.fp8.calibration_text import load_or_calibrate
    from deepseek_triton.builders.fp8.quantize import quantized_graph

    recipe = recipe_named(options.recipe)
    recipe = replace(recipe, keep=recipe.keep + options.keep)
    calibration = load_or_calibrate(options.checkpoint, options.ranges, options.calibration_text, report)
    return quantized_graph(
        checkpoint, recipe, calibration, directory,
        max_seq_len=max_seq_len, network=network, opset=opset, scoring=scoring, version=version, progress=advance,
        report=report,
    )  # fmt: skip


def _write_weights(
    checkpoint: Checkpoint, options: BuildOptions, max_seq_len: int, directory: Path, report: Report
) -> tuple[Path, Recipe | None, dict[str, Any]]:
    """The cuda target's file, the recipe as for a graph, and the decoder's dimensions."""
    from deepseek_triton.builders.targets.cuda_weights import check_recipe, decoder_shape, write_weights

    spec, engine = checkpoint.spec, decoder_shape(checkpoint.spec, max_seq_len).to_dict()
    advance = _weights_progress(spec, options.precision, max_seq_len, report)
    if options.precision != "fp8":
        path, _ = write_weights(spec, checkpoint.read, directory, max_seq_len=max_seq_len, progress=advance)
        return path, None, engine
    from deepseek_triton.builders.fp8.calibration_text import load_or_calibrate
    from deepseek_triton.builders.fp8.quantize import NETWORK, Quantizer, settled_recipe

    recipe = recipe_named(options.recipe)
    recipe = replace(recipe, keep=recipe.keep + options.keep)
    check_recipe(recipe)
    calibration = load_or_calibrate(options.checkpoint, options.ranges, options.calibration_text, report)
    # Scales that float16 holds, though these are stored in float32: so the codes are those of the other targets.
    recipe = settled_recipe(checkpoint, recipe, calibration, NETWORK, report)
    quantizer = Quantizer(checkpoint, recipe, calibration, network=NETWORK, report=report)
    path, _ = write_weights(
        spec, quantizer.read, directory,
        max_seq_len=max_seq_len, recipe=recipe, quantized=quantizer.quantized, progress=advance,
    )  # fmt: skip
    return path, recipe, engine


def _compile(
    graph: Path,
    spec: ModelSpec,
    options: BuildOptions,
    settings: EngineSettings,
    recipe: Recipe | None,
    max_seq_len: int,
    directory: Path,
    report: Report,
) -> tuple[Path, dict[str, Any]]:
    """The plan's path, and what the manifest says of it."""
    from deepseek_triton.builders.tensorrt.build import build_engine
    from deepseek_triton.ensemble.artefacts.tensorrt_api import PLAN_FILE

    built = build_engine(
        graph, directory / PLAN_FILE,
        target=options.target,
        precision=options.precision,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_seq_len=max_seq_len,
        compute_capability=options.compute_capability,
        fp8_modules=_fp8_modules(spec, recipe),
        timing_cache=options.timing_cache,
        progress=report,
    )  # fmt: skip
    return built.path, built.plan.to_dict() | {"census": built.census.to_dict()}


def _weights_progress(spec: ModelSpec, precision: str, max_seq_len: int, report: Report) -> Progress:
    itemsize = DTYPES[NETWORK_OF[precision]].itemsize
    total = (spec.num_parameters() + max_seq_len * spec.head_dim) * itemsize
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        report("weights", done, total)

    return advance


def _require_means(spec: ModelSpec, options: BuildOptions, directory: Path) -> None:
    """TensorRT, a GPU that it can build for, and room on the disk: told before minutes of quantising, not after."""
    if options.target not in ("onnx", "cuda"):
        from deepseek_triton.builders.tensorrt.compiler import resolve_target

        resolve_target(options.target, options.precision, options.compute_capability)
    needed = spec.num_parameters() * (4 if options.precision == "fp32" else 2)
    if options.target not in ("onnx", "cuda"):
        needed *= 2  # the graph, for as long as it is compiled, and the plan
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise BuildError(f"{options.repository}: {needed // 2**20} MiB needed, {free // 2**20} MiB free; make room")


def _onnx_opset() -> int:
    """The newest opset that the ONNX Runtime installed here can run; Python 3.10 has none later than 1.23."""
    installed = tuple(int(part) for part in package_version("onnxruntime").split(".")[:2])
    for opset, needed in ONNX_RUNTIME_FOR_OPSET.items():
        if installed >= needed:
            return opset
    raise BuildError(f"onnxruntime {package_version('onnxruntime')} is too old; pip install 'onnxruntime>=1.23'")


def _shapes(path: Path) -> dict[str, list[int | str]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
