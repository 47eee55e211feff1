"""Choose what is kept by what each part does on a text.

The model runs layer by layer over the windows, and each layer is pruned before the next one is measured: a layer sees
what the pruned ones before it give, and makes up for them. In memory are one layer, the second moment of one matrix's
inputs, and the windows' hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.read_ahead import TensorPrefetch
from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.fp8.calibrate import Report, check_finite, check_windows
from deepseek_triton.builders.fp8.forward.layer import layer_runner
from deepseek_triton.builders.fp8.forward.layer_session import embed
from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays, best_arrays
from deepseek_triton.builders.lifecycle.pruning.choose import Choice, Sizes, best_experts
from deepseek_triton.builders.lifecycle.pruning.experts import ExpertStatistics
from deepseek_triton.builders.lifecycle.pruning.kept import (
    DENSE,
    EXPERT,
    SHARED,
    Kept,
    best,
    expanded,
    head_columns,
)
from deepseek_triton.builders.lifecycle.pruning.options import CHANNELS, EXPERTS, HEADS, LAYERS, PruneOptions
from deepseek_triton.builders.lifecycle.pruning.refit import InputMoment
from deepseek_triton.ensemble.decoder import dense_mlp, moe
from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.gqa import ATTENDED
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

Weights = dict[str, NDArray[Any]]


def choose_by_text(
    checkpoint: Checkpoint,
    options: PruneOptions,
    sizes: Sizes,
    windows: Sequence[NDArray[Any]],
    directory: Path,
    report: Report,
) -> Choice:
    """Run the model over `windows` of token ids; matrices that are fitted anew lie in `directory`.

    Raises:
        BuildError: the text is too short or of another tokenizer, or the model overflows on it.
    """
    spec = checkpoint.spec
    walk = _Walk(spec, options, sizes, directory)
    names = [name for name in spec.tensor_shapes() if name.startswith(("model.embed_tokens.", "model.layers."))]
    ids = check_windows(windows, spec.vocab_size)
    with TensorPrefetch(checkpoint.read, names) as ahead:
        walk.begin(embed(ahead.read("model.embed_tokens.weight"), ids))
        for layer in range(spec.num_layers):
            report("measure", layer, spec.num_layers)
            prefix = layer_prefix(layer)
            walk.step(layer, {prefix + name: ahead.read(prefix + name) for name in spec.layer_shapes(layer)})
    report("measure", spec.num_layers, spec.num_layers)
    return walk.choice()


class _Walk:
    """One pass over the layers."""

    def __init__(self, spec: ModelSpec, options: PruneOptions, sizes: Sizes, directory: Path) -> None:
        self._spec, self._options, self._sizes, self._directory = spec, options, sizes, directory
        self._arrays: Arrays = best_arrays()
        self._hidden: list[Array] = []
        self._influence = np.zeros(spec.num_layers)
        self._kept = Kept(tuple(range(spec.num_layers)))
        self._refitted: dict[str, Callable[[], NDArray[Any]]] = {}
        self._num_shared = spec.experts.num_shared_experts if spec.experts else 0

    def begin(self, hidden: Sequence[NDArray[np.float32]]) -> None:
        """hidden [seq_len, hidden_size] of each window."""
        self._hidden = [self._arrays.put(window) for window in hidden]

    def step(self, layer: int, weights: Weights) -> None:
        """Measure a layer, choose what it keeps, and go on with what is left of it."""
        kind = self._options.kind
        if kind == LAYERS:
            before = self._hidden
            self._run(self._spec, layer, weights)
            self._influence[layer] = _influence(before, self._hidden, self._arrays)
            check_finite(f"layer {layer}'s output", self._influence)
            return
        changed: Weights = {}
        for part in self._spec.parts(layer):
            if kind == CHANNELS and isinstance(part, DenseMlp):
                changed |= self._dense(layer, weights)
            elif isinstance(part, MixtureOfExperts) and kind in (CHANNELS, EXPERTS):
                self._experts(layer, part, weights)
            elif kind == HEADS and (widths := head_columns(part)):
                changed |= self._heads(layer, widths, weights)
        left = {}
        for name, weight in weights.items():
            if (new_name := self._kept.new_name(name)) is not None:
                left[new_name] = changed.get(name, self._kept.sliced(self._spec, name, weight))
        self._run(self._kept.spec(self._spec), layer, left)

    def choice(self) -> Choice:
        """What is kept, after the last layer."""
        kept = self._kept
        if self._options.kind == LAYERS:
            kept = Kept(tuple(int(layer) for layer in best(self._influence, self._sizes.layers)))
        return Choice(kept, self._refitted)

    def _dense(self, layer: int, weights: Weights) -> Weights:
        mlp = layer_prefix(layer) + DENSE
        name = f"{mlp}.down_proj.weight"
        moment = self._moment(layer, weights, dense_mlp.PRODUCT, weights[name].shape[1])
        kept = self._kept.channels[mlp] = best(moment.scores(weights[name], 1), self._sizes.channels)
        return self._refit(moment, name, weights[name], kept)

    def _heads(self, layer: int, widths: dict[str, int], weights: Weights) -> Weights:
        ((module, width),) = widths.items()
        name = f"{layer_prefix(layer)}{module}.weight"
        moment = self._moment(layer, weights, ATTENDED, weights[name].shape[1])
        kept = self._kept.groups[layer] = best(moment.scores(weights[name], width), self._sizes.groups)
        return self._refit(moment, name, weights[name], expanded(kept, width))

    def _experts(self, layer: int, part: MixtureOfExperts, weights: Weights) -> None:
        """Whole experts by their scores, or the channels of each by what they add."""
        statistics = ExpertStatistics(part, layer, weights.__getitem__)
        shared = InputMoment(part.shared_size, self._arrays) if part.shared_size else None
        outputs = (moe.NORM, moe.SHARED_PRODUCT) if shared else (moe.NORM,)
        for values in self._outputs(layer, weights, outputs):
            statistics.add(np.asarray(self._arrays.get(values[0])))
            if shared:
                shared.add(values[1])
        if self._options.kind == EXPERTS:
            scores = statistics.scores()
            check_finite(f"layer {layer}'s experts", scores)
            self._kept.experts[layer] = best_experts(scores, self._sizes.experts, part.options)
            return
        prefix = layer_prefix(layer)
        for expert in range(part.options.num_experts):
            mlp = f"{prefix}{EXPERT}{expert}"
            down = np.asarray(weights[f"{mlp}.down_proj.weight"], np.float32)
            scores = statistics.squares(expert) * np.sum(np.square(down), axis=0)
            self._kept.channels[mlp] = best(scores, self._sizes.expert_channels)
        if shared:
            mlp = prefix + SHARED
            count = self._sizes.of_mlp(mlp, self._num_shared)
            self._kept.channels[mlp] = best(shared.scores(weights[f"{mlp}.down_proj.weight"], 1), count)

    def _moment(self, layer: int, weights: Weights, tap: str, channels: int) -> InputMoment:
        moment = InputMoment(channels, self._arrays)
        for (value,) in self._outputs(layer, weights, (tap,)):
            moment.add(value)
        return moment

    def _refit(self, moment: InputMoment, name: str, weight: NDArray[Any], kept: NDArray[np.int64]) -> Weights:
        if not self._options.is_refitted:
            return {}
        fitted = moment.refitted(weight, kept)
        check_finite(name, fitted)
        path = self._directory / f"{name}.npy"
        np.save(path, fitted)
        self._refitted[name] = lambda: np.load(path)
        return {name: fitted}

    def _outputs(self, layer: int, weights: Weights, names: tuple[str, ...]) -> list[tuple[Array, ...]]:
        """Values of the layer's graph on each window, without its output."""
        return list(self._each(self._spec, layer, weights, names, keeps_hidden=True))

    def _run(self, spec: ModelSpec, layer: int, weights: Weights) -> None:
        self._each(spec, layer, weights, (), keeps_hidden=False)

    def _each(
        self, spec: ModelSpec, layer: int, weights: Weights, names: tuple[str, ...], *, keeps_hidden: bool
    ) -> list[tuple[Array, ...]]:
        longest, found, hidden = max(map(len, self._hidden)), [], []
        with layer_runner(spec, layer, weights.__getitem__, self._arrays, max_seq_len=longest, outputs=names) as runner:
            for window in self._hidden:
                output, *values = runner.run(window, names)
                hidden.append(output)
                found.append(tuple(values))
        if not keeps_hidden:
            self._hidden = hidden
        return found


def _influence(before: Sequence[Array], after: Sequence[Array], arrays: Arrays) -> float:
    """How far a layer turns the hidden state: 1 - the mean cosine over all tokens (ShortGPT, arXiv 2403.03853)."""
    total, tokens = 0.0, 0
    for one, other in zip(before, after, strict=True):
        x, y = (np.asarray(arrays.get(rows), np.float64) for rows in (one, other))
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        total += float(np.sum(np.sum(x * y, axis=1) / np.maximum(norms, 1e-30)))
        tokens += len(x)
    return 1.0 - total / tokens
