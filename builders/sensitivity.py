"""Which layers suffer most from FP8, measured: one input's layers at a time are rounded, all else stays float.

Every perturbed model's hidden states travel through the layers together, so each layer is read once and memory holds
one layer and four windows for each layer before it. The ranking is KL divergence from the float model a byte saved;
a byte budget then says how many of the first stay in the network's precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from builders.calibrate import Calibration, Report
from builders.checkpoint import Checkpoint
from builders.evaluate import Final, compare
from builders.graph.decoder import DTYPES
from builders.graph.float8 import Float8Linear
from builders.layers import TAPS, embed, final_norm, layer_prefix, layer_session
from builders.quantize import Quantizer
from builders.recipe import Recipe
from builders.spec import ModelSpec

WINDOW_LEN = 192  # tokens that the ranking is measured on: many models run, each once


@dataclass(frozen=True)
class Sensitivity:
    """What FP8 costs in the layers that read one input.

    modules: their names. mean_kl: in nats a token. extra_bytes: what keeping them in the network's precision takes.
    """

    modules: tuple[str, ...]
    mean_kl: float
    extra_bytes: int


def measure_sensitivity(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration,
    network: str = "fp16",
    report: Report = lambda what, done, total: None,
) -> list[Sensitivity]:
    """Every group of layers that the recipe would make FP8, most KL for each byte first.

    Args:
        checkpoint: read once, in order: open another for the build.
    """
    spec = checkpoint.spec
    window = max(calibration.window_arrays(), key=len)[:WINDOW_LEN]
    simple = replace(recipe, rounding="nearest", extra_bytes=0.0, bias_correction=False)
    quantizer = Quantizer(checkpoint, simple, calibration, network=network)
    embedding = quantizer.read("model.embed_tokens.weight")
    exact = embed(embedding, [window])[0]
    groups: list[tuple[str, ...]] = []
    streams: list[NDArray[np.float32]] = []
    for layer in range(spec.num_layers):
        report("rank layers", layer, spec.num_layers)
        with layer_session(spec, layer, quantizer.read, max_seq_len=len(window)) as session:
            streams = [session.run(stream)[0] for stream in streams]
            (next_exact,) = session.run(exact)
        for modules in TAPS.values():
            names = (layer_prefix(layer) + module for module in modules)
            group = tuple(name for name in names if recipe.precision_of(name) == "fp8")
            if not group:
                continue

            def quantized(module: str, group: tuple[str, ...] = group) -> Float8Linear | None:
                return quantizer.quantized(module) if module in group else None

            with layer_session(spec, layer, quantizer.read, max_seq_len=len(window), quantized=quantized) as session:
                streams.append(session.run(exact)[0])
            groups.append(group)
        exact = next_exact
    report("rank layers", spec.num_layers, spec.num_layers)
    norm = quantizer.read("model.norm.weight")
    head = np.asarray(embedding if spec.tie_word_embeddings else quantizer.read("lm_head.weight"), np.float32)
    reference = Final((final_norm(exact, norm, spec.rms_norm_eps),), head)
    ranking = []
    for group, stream in zip(groups, streams, strict=True):
        candidate = Final((final_norm(stream, norm, spec.rms_norm_eps),), head)
        kl = compare(reference, candidate, [window]).mean_kl
        ranking.append(Sensitivity(group, kl, _extra_bytes(spec, group, network)))
    return sorted(ranking, key=lambda s: (-s.mean_kl / s.extra_bytes, s.modules))


def keep_most_sensitive(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration,
    network: str = "fp16",
    report: Report = lambda what, done, total: None,
) -> Recipe:
    """The recipe with `keep` extended by the most sensitive layers that `extra_bytes` has room for."""
    budget = int(recipe.extra_bytes * float8_bytes(checkpoint.spec, recipe, network))
    kept: list[str] = []
    for candidate in measure_sensitivity(checkpoint, recipe, calibration, network, report):
        if candidate.extra_bytes <= budget:
            kept += candidate.modules
            budget -= candidate.extra_bytes
    return replace(recipe, keep=(*recipe.keep, *sorted(kept)), extra_bytes=0.0)


def float8_bytes(spec: ModelSpec, recipe: Recipe, network: str) -> int:
    """Bytes of all weights under the recipe, scales left out."""
    itemsize = DTYPES[network].itemsize
    return sum(
        math.prod(shape) * (1 if recipe.precision_of(name.removesuffix(".weight")) == "fp8" else itemsize)
        for name, shape in spec.tensor_shapes().items()
    )


def _extra_bytes(spec: ModelSpec, modules: tuple[str, ...], network: str) -> int:
    shapes, extra = spec.tensor_shapes(), DTYPES[network].itemsize - 1
    return sum(math.prod(shapes[f"{module}.weight"]) * extra for module in modules)
