"""Write the weights of target cuda: fused matrices in E4M3 or bfloat16.

`ensemble/artefacts/cuda_layout.py` has the file's layout. What enters are the functions that the graph's builder calls
too, which return a weight or an FP8 layer by name; what leaves is one file. Modules that read the same input are fused
into one matrix, which is FP8 if all of them are. One decoder layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.errors import BuildError, CheckpointError
from deepseek_triton.builders.fp8.recipe import Recipe
from deepseek_triton.builders.graph.builder import Progress
from deepseek_triton.builders.graph.nodes import Quantized, Read
from deepseek_triton.builders.graph.rope import rope_tables
from deepseek_triton.builders.targets.artefacts.graph import chosen_recipe, weights_progress
from deepseek_triton.builders.targets.artefacts.target import BuildJob
from deepseek_triton.ensemble.artefacts.cuda_layout import WEIGHTS_FILE, DecoderShape, stored_norms
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry, write_tensors
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)


def decoder_shape(spec: ModelSpec, max_seq_len: int) -> DecoderShape:
    """The dimensions that the runner needs."""
    return DecoderShape(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        max_seq_len=max_seq_len,
        tie_word_embeddings=spec.tie_word_embeddings,
        qk_norm=spec.qk_norm,
    )


def check_recipe(recipe: Recipe) -> None:
    """Check that the kernels can carry out `recipe`.

    Raises:
        BuildError: it has static activation scales.
    """
    if recipe.activations != "dynamic":
        raise BuildError(
            f"recipe: activations are {recipe.activations!r}; target cuda scales each token; use default or mixed"
        )


def write_engine_weights(job: BuildJob) -> tuple[Path, Recipe | None]:
    """Write the weights that the build asks for.

    Returns:
        The file's path, and for FP8 the recipe with every layer that stayed float.

    Raises:
        BuildError: the kernels can't carry out the recipe, or the calibration failed.
    """
    options, spec, advance = job.options, job.spec, weights_progress(job)
    if options.precision != "fp8":
        path, _ = write_weights(
            spec, job.checkpoint.read, job.directory, max_seq_len=job.max_seq_len, progress=advance
        )  # fmt: skip
        return path, None
    from deepseek_triton.builders.fp8.calibration_text import load_or_calibrate
    from deepseek_triton.builders.fp8.quantize import settled_recipe
    from deepseek_triton.builders.fp8.quantizer import NETWORK, Quantizer

    recipe = chosen_recipe(options)
    check_recipe(recipe)
    calibration = load_or_calibrate(options.checkpoint, options.ranges, options.calibration_text, job.report)
    # The scales must be representable in float16, though this file has float32: so the codes equal the other targets'.
    recipe = settled_recipe(job.checkpoint, recipe, calibration, NETWORK, job.report)
    quantizer = Quantizer(job.checkpoint, recipe, calibration, network=NETWORK, report=job.report)
    path, _ = write_weights(
        spec, quantizer.read, job.directory,
        max_seq_len=job.max_seq_len, recipe=recipe, quantized=quantizer.quantized, progress=advance,
    )  # fmt: skip
    return path, recipe


def write_weights(
    spec: ModelSpec,
    read: Read,
    directory: Path,
    *,
    max_seq_len: int,
    recipe: Recipe | None = None,
    quantized: Quantized | None = None,
    progress: Progress | None = None,
) -> tuple[Path, dict[str, TensorEntry]]:
    """Write the weights into `directory`; without a `recipe` all of them in bfloat16.

    Args:
        read: gives a weight by its Hugging Face name; called once for each, in the graph's order.
        quantized: gives a module in FP8, or None.
        progress: called with the number of bytes just written.

    Returns:
        The file's path and what it holds.

    Raises:
        BuildError: as `check_recipe`. CheckpointError: a weight isn't finite.
    """
    if recipe is not None:
        check_recipe(recipe)
    shape = decoder_shape(spec, max_seq_len)
    fp8, biased = _stored_as(spec, recipe)
    entries = shape.entries(fp8, biased)

    def arrays() -> Iterator[tuple[str, Array]]:
        cos, sin = rope_tables(spec.rope, spec.head_dim, max_seq_len)
        tables = {"rope.cos": cos, "rope.sin": sin}
        yield "embedding", _bfloat16("model.embed_tokens.weight", read("model.embed_tokens.weight"))
        for layer in range(spec.num_layers):
            yield from _layer(spec, layer, read, quantized or (lambda module: None), fp8, biased)
        yield "norm", _bfloat16("model.norm.weight", read("model.norm.weight"))
        if not spec.tie_word_embeddings:
            yield "head", _bfloat16("lm_head.weight", read("lm_head.weight"))
        yield from tables.items()

    def counted() -> Iterator[tuple[str, Array]]:
        for name, array in arrays():
            yield name, array
            if progress:
                progress(array.nbytes)

    path = directory / WEIGHTS_FILE
    write_tensors(path, entries, counted())
    return path, entries


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
            is_corrected = is_fp8 and recipe is not None and recipe.bias_correction
            if is_corrected or any(f"{module}.bias" in shapes for module in modules):
                biased.add(f"layers.{layer}.{matrix}")
    return frozenset(fp8), frozenset(biased)


def _fused(spec: ModelSpec, layer: int) -> dict[str, tuple[str, ...]]:
    """Stored matrix → the modules whose rows it holds."""
    return {matrix: modules for part in spec.parts(layer) for matrix, modules in part.fused.items()}


def _layer(
    spec: ModelSpec, layer: int, read: Read, quantized: Quantized, fp8: frozenset[str], biased: frozenset[str]
) -> Iterator[tuple[str, Array]]:
    prefix, stored = layer_prefix(layer), f"layers.{layer}."
    weights = {name: read(prefix + name) for name in spec.layer_shapes(layer)}
    for norm in stored_norms(spec.parts(layer)):
        name = f"{norm.module}.weight"
        yield stored + norm.stored, _bfloat16(prefix + name, weights[name])
    for matrix, modules in _fused(spec, layer).items():
        name = stored + matrix
        if name in fp8:
            linears = {module: quantized(prefix + module) for module in modules}
            codes, scales = [], []
            for module, linear in linears.items():
                if linear is None or linear.input_scale is not None:
                    raise BuildError(f"{prefix}{module} was not quantised as the recipe says; build again")
                codes.append(linear.weight)
                scales.append(np.broadcast_to(np.asarray(linear.scale, np.float32), len(linear.weight)))
            yield f"{name}.weight", np.concatenate(codes)
            yield f"{name}.scale", np.concatenate(scales)
            found = {module: linear.bias for module, linear in linears.items() if linear is not None}
        else:
            rows = [_bfloat16(f"{prefix}{module}.weight", weights[f"{module}.weight"]) for module in modules]
            yield f"{name}.weight", np.concatenate(rows)
            found = {module: weights.get(f"{module}.bias") for module in modules}
        if name in biased:
            sizes = {module: len(weights[f"{module}.weight"]) for module in modules}
            parts = [np.zeros(sizes[m], np.float32) if (b := found[m]) is None else b for m in modules]
            yield f"{name}.bias", np.concatenate([np.asarray(part, np.float32) for part in parts])


def _bfloat16(name: str, array: Array) -> Array:
    rounded: Array = np.asarray(array, np.float32).astype(BF16)
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise CheckpointError(f"{name} holds numbers that are not finite as bfloat16; the checkpoint is corrupt")
    return rounded
