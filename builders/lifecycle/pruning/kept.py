"""Kept: which channels, heads, layers and experts of a model are left, and what of each tensor that leaves.

Nothing here knows why something is kept. Tensors are in this project's order of rotary channels; see
`writing.py` for the checkpoint's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.decoder import gqa, mla
from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.mla import LatentAttention
from deepseek_triton.ensemble.decoder.moe import BIAS, ROUTER, MixtureOfExperts
from deepseek_triton.ensemble.decoder.options import ExpertOptions
from deepseek_triton.ensemble.decoder.part import Part
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

Indices = NDArray[np.int64]
DENSE, SHARED, EXPERT = "mlp", "mlp.shared_experts", "mlp.experts."


@dataclass(frozen=True)
class Kept:
    """What is left, by the parent's numbers, in ascending order; what isn't named is left whole.

    layers: those that are left. channels: a gated MLP's name (`model.layers.3.mlp`, `….mlp.experts.5`) → its inner
    channels. groups: layer → groups of heads that share a key head (of latent attention: heads). experts: layer →
    experts.
    """

    layers: tuple[int, ...]
    channels: dict[str, Indices] = field(default_factory=dict)
    groups: dict[int, Indices] = field(default_factory=dict)
    experts: dict[int, Indices] = field(default_factory=dict)

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """The dimensions of what is left of `spec`."""
        changes: dict[str, Any] = {"num_layers": len(self.layers)}
        for name, channels in self.channels.items():
            if name.endswith(f".{DENSE}"):
                changes["intermediate_size"] = len(channels)
        for groups in self.groups.values():
            per_group = spec.num_heads // spec.num_kv_heads
            changes |= {"num_heads": len(groups) * per_group, "num_kv_heads": len(groups)}
        if spec.experts is not None:
            changes["experts"] = self._expert_options(spec.experts)
        return replace(spec, **changes)

    def _expert_options(self, options: ExpertOptions) -> ExpertOptions:
        first = sum(layer < options.first_dense_layers for layer in self.layers)
        options = replace(options, first_dense_layers=first)
        for experts in self.experts.values():
            options = replace(options, num_experts=len(experts))
        inner = next((len(kept) for name, kept in self.channels.items() if EXPERT in name), options.intermediate_size)
        return replace(options, intermediate_size=inner)

    def new_name(self, name: str) -> str | None:
        """The name that a tensor of the parent has in what is left; None: it isn't left."""
        layer = layer_of(name)
        if layer is None:
            return name
        if layer not in self.layers:
            return None
        short = name.removeprefix(layer_prefix(layer))
        if short.startswith(EXPERT) and layer in self.experts:
            number, _, rest = short.removeprefix(EXPERT).partition(".")
            place = np.flatnonzero(self.experts[layer] == int(number))
            if not len(place):
                return None
            short = f"{EXPERT}{int(place[0])}.{rest}"
        return layer_prefix(self.layers.index(layer)) + short

    def sliced(self, spec: ModelSpec, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """What is left of the parent's tensor `name`."""
        layer = layer_of(name)
        if layer is None:
            return array
        module, _, kind = name.rpartition(".")
        mlp, _, matrix = module.rpartition(".")
        if mlp in self.channels:
            if matrix != "down_proj":
                return array[self.channels[mlp]]
            return array[:, self.channels[mlp]] if kind == "weight" else array
        short = name.removeprefix(layer_prefix(layer))
        if layer in self.experts and short in (ROUTER, BIAS):
            return array[self.experts[layer]]
        if layer in self.groups:
            for part in spec.parts(layer):
                rows, columns = head_rows(part), head_columns(part)
                own = module.removeprefix(layer_prefix(layer))
                if own in rows:
                    return array[expanded(self.groups[layer], rows[own])]
                if own in columns and kind == "weight":
                    return array[:, expanded(self.groups[layer], columns[own])]
        return array


def head_rows(part: Part) -> dict[str, int]:
    """Module → its output channels of one group of heads."""
    if isinstance(part, GroupedQueryAttention):
        query = part.num_heads // part.num_kv_heads * part.head_dim
        return {gqa.Q: query, gqa.K: part.head_dim, gqa.V: part.head_dim}
    if isinstance(part, LatentAttention):
        keys_and_values = part.options.qk_nope_head_dim + part.options.v_head_dim
        return {part.query.module: part.qk_head_dim, mla.KV_B: keys_and_values}
    return {}


def head_columns(part: Part) -> dict[str, int]:
    """Module → its input channels of one group of heads."""
    if isinstance(part, GroupedQueryAttention):
        return {gqa.OUT: part.num_heads // part.num_kv_heads * part.head_dim}
    if isinstance(part, LatentAttention):
        return {mla.OUT: part.options.v_head_dim}
    return {}


def gated_mlps(spec: ModelSpec, layer: int) -> dict[str, int]:
    """The name of each gated MLP of a layer → its inner channels."""
    prefix, found = layer_prefix(layer), {}
    for part in spec.parts(layer):
        if isinstance(part, DenseMlp):
            found[prefix + DENSE] = part.intermediate_size
        if isinstance(part, MixtureOfExperts):
            inner = part.options.intermediate_size
            found |= {f"{prefix}{EXPERT}{expert}": inner for expert in range(part.options.num_experts)}
            if part.shared_size:
                found[prefix + SHARED] = part.shared_size
    return found


def expanded(groups: Indices, width: int) -> Indices:
    """The channels of groups of `width` neighbours."""
    channels: Indices = (groups[:, None] * width + np.arange(width)).reshape(-1)
    return channels


def best(scores: NDArray[Any], count: int) -> Indices:
    """The `count` largest of `scores` [n], in ascending order; of equal ones the first."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count]
    chosen: Indices = np.sort(order).astype(np.int64)
    return chosen


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None
