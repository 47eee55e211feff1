"""Write the weights of target cuda: fused matrices in E4M3 or bfloat16.

`ensemble/artefacts/cuda_layout.py` has the file's layout. What enters are the functions that the graph's builder calls
too, which return a weight or an FP8 layer by name; what leaves is one file. Modules that read the same input are fused
into one matrix, which is FP8 if all of them are; so is a stack of experts. One decoder layer is in memory at a time, of
the experts one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.errors import BuildError, CheckpointError
from deepseek_triton.builders.fp8.recipe import Recipe
from deepseek_triton.builders.fp8.rounding.host import row_amax
from deepseek_triton.builders.graph.builder import Progress
from deepseek_triton.builders.graph.float8 import Float8Linear
from deepseek_triton.builders.graph.nodes import Float8Layers, Read
from deepseek_triton.builders.graph.rope import rope_tables
from deepseek_triton.builders.targets.artefacts.decoder_shape import decoder_shape
from deepseek_triton.builders.targets.artefacts.graph import calibrated, chosen_recipe, weights_progress
from deepseek_triton.builders.targets.artefacts.target import Artefacts, BuildJob
from deepseek_triton.ensemble.artefacts.cuda_layout import WEIGHTS_FILE, stored_norms, stored_plains
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry, write_tensors
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)


def check_recipe(recipe: Recipe) -> None:
    """Check that the kernels can carry out `recipe`.

    Raises:
        BuildError: it has static activation scales.
    """
    if recipe.activations != "dynamic":
        raise BuildError(
            f"recipe: activations are {recipe.activations!r}; target cuda scales each token; use default, fast or mixed"
        )


def write_engine_weights(job: BuildJob, *, takes_blocks: bool = False) -> Artefacts:
    """Write the weights that the build asks for; takes_blocks: an FP8 checkpoint's own scales for blocks stay.

    Returns:
        The file, and for FP8 the recipe with every layer that stayed float.

    Raises:
        BuildError: the kernels can't carry out the recipe, or the calibration failed.
    """
    spec, advance = job.spec, weights_progress(job)
    if job.options.precision != "fp8":
        written = write_weights(spec, job.checkpoint.read, job.directory, max_seq_len=job.max_seq_len, progress=advance)
        return _artefacts(job, None, written)
    from deepseek_triton.builders.fp8.quantize import quantizing, settled_recipe
    from deepseek_triton.builders.fp8.quantizer import NETWORK

    recipe = chosen_recipe(job, "dynamic", takes_blocks=takes_blocks)
    check_recipe(recipe)
    # The scales must be representable in float16, though this file has float32: so the codes equal the other targets'.
    # Those of an FP8 checkpoint stay as they are.
    network = "fp32" if recipe.rounding == "stored" else NETWORK
    calibration, journal = calibrated(job, recipe)
    recipe = settled_recipe(job.checkpoint, recipe, calibration, network, job.report)
    with quantizing(
        job.checkpoint, recipe, calibration, network=network, report=job.report, journal=journal
    ) as quantizer:
        written = write_weights(
            spec, quantizer.read, job.directory,
            max_seq_len=job.max_seq_len, recipe=recipe, quantized=quantizer.quantized, progress=advance,
        )  # fmt: skip
    return _artefacts(job, recipe, written)


def _artefacts(job: BuildJob, recipe: Recipe | None, written: WrittenWeights) -> Artefacts:
    return Artefacts(
        (written.path,), recipe,
        engine=decoder_shape(job.spec, job.max_seq_len).to_dict(), digests={written.path.name: written.sha256},
    )  # fmt: skip


@dataclass(frozen=True)
class WrittenWeights:
    """A file of weights, what it holds, and its SHA-256 in hexadecimal."""

    path: Path
    entries: dict[str, TensorEntry]
    sha256: str


def write_weights(
    spec: ModelSpec,
    read: Read,
    directory: Path,
    *,
    max_seq_len: int,
    recipe: Recipe | None = None,
    quantized: Float8Layers | None = None,
    progress: Progress | None = None,
) -> WrittenWeights:
    """Write the weights into `directory`; without a `recipe` all of them in bfloat16.

    Args:
        read: gives a weight by its Hugging Face name; called once for each, in the graph's order.
        quantized: gives a module in FP8, or None.
        progress: called with the number of bytes just written.

    Raises:
        BuildError: as `check_recipe`. CheckpointError: a weight isn't finite.
    """
    if recipe is not None:
        check_recipe(recipe)
    shape = decoder_shape(spec, max_seq_len)
    fp8, biased = _stored_as(spec, recipe)
    entries = shape.entries(fp8, biased, has_blocks=recipe is not None and recipe.weights == "per_block")

    def arrays() -> Iterator[tuple[str, Array | Iterator[Array]]]:
        cos, sin = rope_tables(spec.rope, spec.rotary_dim, max_seq_len)
        tables = {"rope.cos": cos, "rope.sin": sin}
        yield "embedding", _bfloat16("model.embed_tokens.weight", read("model.embed_tokens.weight"))
        for layer in range(spec.num_layers):
            yield from _layer(spec, layer, read, quantized or (lambda module: None), fp8, biased)
        yield "norm", _bfloat16("model.norm.weight", read("model.norm.weight"))
        if not spec.tie_word_embeddings:
            yield "head", _bfloat16("lm_head.weight", read("lm_head.weight"))
        yield from tables.items()

    def counted() -> Iterator[tuple[str, Array | Iterator[Array]]]:
        for name, array in arrays():
            yield name, array
            if progress:
                progress(entries[name].num_bytes)

    path = directory / WEIGHTS_FILE
    return WrittenWeights(path, entries, write_tensors(path, entries, counted()))


def _stored_as(spec: ModelSpec, recipe: Recipe | None) -> tuple[frozenset[str], frozenset[str]]:
    """The fused matrices in FP8, and those with a bias."""
    fp8, biased = set(), set()
    for layer in range(spec.num_layers):
        shapes = spec.layer_shapes(layer)
        for matrix, modules in _fused(spec, layer).items():
            names = [layer_prefix(layer) + module for module in modules]
            is_fp8 = recipe is not None and all(recipe.precision_of(name) == "fp8" for name in names)
            if is_fp8:
                fp8.add(f"layers.{layer}.{matrix}")
            is_corrected = is_fp8 and recipe is not None and all(map(recipe.corrects, names))
            if is_corrected or any(f"{module}.bias" in shapes for module in modules):
                biased.add(f"layers.{layer}.{matrix}")
        for matrix, stack in _stacked(spec, layer).items():
            names = [layer_prefix(layer) + module for modules in stack for module in modules]
            if recipe is not None and all(recipe.precision_of(name) == "fp8" for name in names):
                fp8.add(f"layers.{layer}.{matrix}")
    return frozenset(fp8), frozenset(biased)


def _fused(spec: ModelSpec, layer: int) -> dict[str, tuple[str, ...]]:
    """Stored matrix → the modules whose rows it holds."""
    return {matrix: modules for part in spec.parts(layer) for matrix, modules in part.fused.items()}


def _stacked(spec: ModelSpec, layer: int) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Stored stack → of each of its matrices the modules whose rows it holds."""
    return {name: stack for part in spec.parts(layer) for name, stack in part.stacked.items()}


def _layer(
    spec: ModelSpec, layer: int, read: Read, quantized: Float8Layers, fp8: frozenset[str], biased: frozenset[str]
) -> Iterator[tuple[str, Array | Iterator[Array]]]:
    prefix, stored = layer_prefix(layer), f"layers.{layer}."
    of_stacks = {f"{module}.weight" for stack in _stacked(spec, layer).values() for m in stack for module in m}
    weights = {name: read(prefix + name) for name in spec.layer_shapes(layer) if name not in of_stacks}
    for norm in stored_norms(spec.parts(layer)):
        name = f"{norm.module}.weight"
        yield stored + norm.stored, _bfloat16(prefix + name, weights[name])
    for matrix, modules in _fused(spec, layer).items():
        name = stored + matrix
        if name in fp8:
            linears = {module: _float8(prefix + module, quantized) for module in modules}
            yield f"{name}.weight", np.concatenate([linear.weight for linear in linears.values()])
            yield f"{name}.scale", np.concatenate([_row_scales(linear) for linear in linears.values()])
            found = {module: linear.bias for module, linear in linears.items()}
        else:
            rows = [_bfloat16(f"{prefix}{module}.weight", weights[f"{module}.weight"]) for module in modules]
            yield f"{name}.weight", np.concatenate(rows)
            found = {module: weights.get(f"{module}.bias") for module in modules}
        if name in biased:
            sizes = {module: len(weights[f"{module}.weight"]) for module in modules}
            parts = [np.zeros(sizes[m], np.float32) if (b := found[m]) is None else b for m in modules]
            yield f"{name}.bias", np.concatenate([np.asarray(part, np.float32) for part in parts])
    for matrix, stack in _stacked(spec, layer).items():
        name = stored + matrix
        if name in fp8:
            scales: list[Array] = []
            yield f"{name}.weight", _codes(prefix, stack, quantized, scales)
            yield f"{name}.scale", np.stack(scales)
        else:
            yield f"{name}.weight", _floats(prefix, stack, read)
    for plain in stored_plains(spec.parts(layer)):
        yield stored + plain.stored, _float32(prefix + plain.name, weights[plain.name])


def _codes(
    prefix: str, stack: tuple[tuple[str, ...], ...], quantized: Float8Layers, scales: list[Array]
) -> Iterator[Array]:
    """The codes of a stack, a matrix at a time; adds each one's row scales to `scales`."""
    for modules in stack:
        linears = [_float8(prefix + module, quantized) for module in modules]
        if any(linear.bias is not None for linear in linears):
            raise BuildError(f"recipe: {prefix}{modules[0]} has a bias; target cuda has none for experts")
        scales.append(np.concatenate([_row_scales(linear) for linear in linears]))
        yield np.concatenate([linear.weight for linear in linears])[None]


def _floats(prefix: str, stack: tuple[tuple[str, ...], ...], read: Read) -> Iterator[Array]:
    """The weights of a stack in bfloat16, a matrix at a time."""
    for modules in stack:
        names = [f"{prefix}{module}.weight" for module in modules]
        yield np.concatenate([_bfloat16(name, read(name)) for name in names])[None]


def _float8(module: str, quantized: Float8Layers) -> Float8Linear:
    linear = quantized(module)
    if linear is None or linear.input_scale is not None:
        raise BuildError(f"{module} was not quantised as the recipe says; build again")
    return linear


def _row_scales(linear: Float8Linear) -> Array:
    scale = np.asarray(linear.scale, np.float32)
    return scale if scale.ndim == 2 else np.broadcast_to(scale, len(linear.weight))


def _float32(name: str, array: Array) -> Array:
    wide: Array = np.asarray(array, np.float32)
    if not np.isfinite(row_amax(wide.reshape(-1, wide.shape[-1]))).all():
        raise CheckpointError(f"{name} holds numbers that are not finite; the checkpoint is corrupt")
    return wide


def _bfloat16(name: str, array: Array) -> Array:
    rounded: Array = array if array.dtype == BF16 else np.asarray(array, np.float32).astype(BF16)
    if not np.isfinite(row_amax(rounded.reshape(-1, rounded.shape[-1]))).all():
        raise CheckpointError(f"{name} holds numbers that are not finite as bfloat16; the checkpoint is corrupt")
    return rounded
