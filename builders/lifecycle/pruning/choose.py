"""Choose what is kept: by the weights alone, or by what each part does on a text, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.lifecycle.pruning.kept import EXPERT, SHARED, Indices, Kept, best
from deepseek_triton.builders.lifecycle.pruning.norms import channel_norms, group_norms, layer_norm
from deepseek_triton.builders.lifecycle.pruning.options import CHANNELS, EXPERTS, HEADS, LAYERS, PruneOptions, num_left
from deepseek_triton.ensemble.decoder.errors import SpecError
from deepseek_triton.ensemble.decoder.options import ExpertOptions
from deepseek_triton.ensemble.decoder.spec import ModelSpec

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Sizes:
    """How many are left: of a dense MLP's channels, an expert's, the groups of heads, the experts, the layers."""

    channels: int
    expert_channels: int
    groups: int
    experts: int
    layers: int

    @classmethod
    def of(cls, spec: ModelSpec, options: PruneOptions) -> Sizes:
        """What `options` leave of `spec`.

        Raises:
            BuildError: nothing or everything would be removed, or the model has no experts.
        """

        def left(total: int, kind: str, noun: str, multiple: int = options.multiple) -> int:
            return num_left(total, options.ratio, multiple, noun) if options.kind == kind else total

        experts = spec.experts
        if experts is None and options.kind == EXPERTS:
            raise BuildError(
                f"{options.checkpoint} is a dense model, without experts to remove; use --method activation or l1"
            )
        has_dense = experts is None or experts.first_dense_layers > 0
        has_experts = experts is not None and experts.first_dense_layers < spec.num_layers
        inner = experts.intermediate_size if experts else 0
        number = experts.num_experts if experts else 0
        groups = experts.num_groups if experts else 1
        return cls(
            channels=left(spec.intermediate_size, CHANNELS, "FFN channels") if has_dense else spec.intermediate_size,
            expert_channels=left(inner, CHANNELS, "channels of an expert") if has_experts else inner,
            groups=left(spec.num_kv_heads, HEADS, "groups of heads"),
            experts=left(number, EXPERTS, "experts", lcm(options.multiple, groups)),
            layers=left(spec.num_layers, LAYERS, "layers"),
        )

    def check(self, spec: ModelSpec) -> None:
        """Is there a model of these sizes? Asked before the minutes of measuring.

        Raises:
            BuildError: there is none.
        """
        experts = spec.experts
        heads = self.groups * (spec.num_heads // spec.num_kv_heads)
        try:
            if experts is not None:
                experts = replace(experts, num_experts=self.experts, intermediate_size=self.expert_channels)
            replace(spec, intermediate_size=self.channels, num_heads=heads, num_kv_heads=self.groups, experts=experts)
        except SpecError as error:
            raise BuildError(f"what is left is no model: {error}; choose another --ratio or --multiple-of") from error

    def of_mlp(self, name: str, num_shared: int) -> int:
        """The channels that a gated MLP keeps, by its name; num_shared: experts that are one wide MLP."""
        if EXPERT in name:
            return self.expert_channels
        return num_shared * self.expert_channels if name.endswith(SHARED) else self.channels


@dataclass(frozen=True)
class Choice:
    """What is kept, and the matrices that were fitted anew without the rest: a tensor's name → its values."""

    kept: Kept
    refitted: dict[str, Callable[[], NDArray[Any]]] = field(default_factory=dict)


def choose_by_norms(checkpoint: Checkpoint, options: PruneOptions, sizes: Sizes, report: Report) -> Choice:
    """By L1 norms; one tensor is in memory at a time."""
    spec, read = checkpoint.spec, checkpoint.read
    layers = tuple(range(spec.num_layers))
    norms = np.zeros(len(layers))
    channels: dict[str, Indices] = {}
    groups: dict[int, Indices] = {}
    num_shared = spec.experts.num_shared_experts if spec.experts else 0
    for layer in layers:
        report("rank", layer, len(layers))
        if options.kind == CHANNELS:
            for name, scores in channel_norms(read, spec, layer).items():
                channels[name] = best(scores, sizes.of_mlp(name, num_shared))
        elif options.kind == HEADS:
            groups[layer] = best(group_norms(read, spec, layer), sizes.groups)
        else:
            norms[layer] = layer_norm(read, spec, layer)
    report("rank", len(layers), len(layers))
    if options.kind == LAYERS:
        layers = tuple(int(layer) for layer in best(norms, sizes.layers))
    return Choice(Kept(layers, channels, groups))


def best_experts(scores: Scores, count: int, options: ExpertOptions) -> Indices:
    """The best experts of a layer: as many of each of the router's groups, so that groups stay what they were."""
    grouped = scores.reshape(options.num_groups, -1)
    each = count // options.num_groups
    chosen = [best(own, each) + index * grouped.shape[1] for index, own in enumerate(grouped)]
    return np.concatenate(chosen)
