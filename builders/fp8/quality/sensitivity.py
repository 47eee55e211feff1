"""Measure which layers lose most by FP8: the layers that read one input are rounded, all others stay float.

The hidden states of all these models go through a layer together, so each layer is read once; memory holds one layer
and four windows for each group of layers before it. The ranking is by KL divergence from the float model per byte
saved. A byte budget says how many of the first groups keep the network's precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.fp8.calibrate import Calibration, Report
from deepseek_triton.builders.fp8.forward.layer_session import Ids, embed, final_norm, layer_session
from deepseek_triton.builders.fp8.quality.evaluate import Final, compare
from deepseek_triton.builders.fp8.quantizer import Quantizer
from deepseek_triton.builders.fp8.recipe import Recipe
from deepseek_triton.builders.fp8.rounding.e4m3 import Float32
from deepseek_triton.builders.graph.decoder import DTYPES
from deepseek_triton.builders.graph.float8 import Float8Linear
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

# The ranking is measured on few tokens, because many models must run, and on several texts, because they differ.
NUM_WINDOWS = 4
WINDOW_LEN = 64  # tokens


@dataclass(frozen=True)
class Sensitivity:
    """The cost of FP8 in the layers that read one input.

    modules: the layers' names. mean_kl: nats per token. extra_bytes: what the network's precision takes beyond FP8.
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
    """Rank every group of layers that the recipe converts to FP8, the largest KL per byte first.

    Args:
        checkpoint: every read counts in its digest, so open the checkpoint again for the build.
    """
    spec = checkpoint.spec
    windows = _sample_windows(calibration)
    simple = replace(recipe, rounding="nearest", extra_bytes=0.0, bias_correction=False)
    quantizer = Quantizer(checkpoint, simple, calibration, network=network)
    embedding = quantizer.read("model.embed_tokens.weight")
    exact = embed(embedding, windows)
    groups: list[tuple[str, ...]] = []
    streams: list[list[Float32]] = []
    for layer in range(spec.num_layers):
        report("rank layers", layer, spec.num_layers)
        with layer_session(spec, layer, quantizer.read, max_seq_len=WINDOW_LEN) as session:
            streams = [[session.run(hidden)[0] for hidden in stream] for stream in streams]
            next_exact = [session.run(hidden)[0] for hidden in exact]
        for tap in spec.taps(layer):
            names = (layer_prefix(layer) + module for module in tap.modules)
            group = tuple(name for name in names if recipe.precision_of(name) == "fp8")
            if not group:
                continue

            def quantized(module: str, group: tuple[str, ...] = group) -> Float8Linear | None:
                return quantizer.quantized(module) if module in group else None

            with layer_session(spec, layer, quantizer.read, max_seq_len=WINDOW_LEN, quantized=quantized) as session:
                streams.append([session.run(hidden)[0] for hidden in exact])
            groups.append(group)
        exact = next_exact
    report("rank layers", spec.num_layers, spec.num_layers)
    norm = quantizer.read("model.norm.weight")
    head = np.asarray(embedding if spec.tie_word_embeddings else quantizer.read("lm_head.weight"), np.float32)
    reference = Final(tuple(final_norm(hidden, norm, spec.rms_norm_eps) for hidden in exact), head)
    ranking = []
    for group, stream in zip(groups, streams, strict=True):
        candidate = Final(tuple(final_norm(hidden, norm, spec.rms_norm_eps) for hidden in stream), head)
        kl = compare(reference, candidate, windows).mean_kl
        ranking.append(Sensitivity(group, kl, _extra_bytes(spec, group, network)))
    return sorted(ranking, key=lambda s: (-s.mean_kl / s.extra_bytes, s.modules))


def keep_most_sensitive(
    spec: ModelSpec, recipe: Recipe, ranking: Sequence[Sensitivity], network: str = "fp16"
) -> Recipe:
    """The recipe with `keep` extended by the groups of the ranking that fit into `extra_bytes`, in order."""
    budget = int(recipe.extra_bytes * float8_bytes(spec, recipe, network))
    kept: list[str] = []
    for candidate in ranking:
        if candidate.extra_bytes <= budget:
            kept += candidate.modules
            budget -= candidate.extra_bytes
    return replace(recipe, keep=(*recipe.keep, *sorted(kept)), extra_bytes=0.0)


def _sample_windows(calibration: Calibration) -> list[Ids]:
    windows = calibration.window_arrays()
    longest = sorted(windows, key=len, reverse=True)[: max(NUM_WINDOWS, len(windows) // 2)]
    step = max(1, len(longest) // NUM_WINDOWS)
    return [window[:WINDOW_LEN] for window in longest[::step][:NUM_WINDOWS]]


def float8_bytes(spec: ModelSpec, recipe: Recipe, network: str) -> int:
    """Bytes of all weights under the recipe, without the scales."""
    itemsize = DTYPES[network].itemsize
    return sum(
        math.prod(shape) * (1 if recipe.precision_of(name.removesuffix(".weight")) == "fp8" else itemsize)
        for name, shape in spec.tensor_shapes().items()
    )


def _extra_bytes(spec: ModelSpec, modules: tuple[str, ...], network: str) -> int:
    shapes, extra = spec.tensor_shapes(), DTYPES[network].itemsize - 1
    return sum(math.prod(shapes[f"{module}.weight"]) * extra for module in modules)
