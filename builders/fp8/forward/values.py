"""What the parts of one layer compute with: its weights in arrays, linear layers, norms, and the taps of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays
from deepseek_triton.builders.graph.float8 import E4M3_MAX, MIN_TOKEN_SCALE, Float8Linear
from deepseek_triton.builders.graph.nodes import Float8Layers, Read
from deepseek_triton.builders.graph.rope import rope_tables
from deepseek_triton.ensemble.decoder.part import Norm, Plain
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix


class LayerValues:
    """One layer's weights, put into `arrays` once; names are without the layer's prefix.

    taps: the values that linear layers read in the current run, by name. cache: keys and values of all tokens so far, a
    dict once they are to be kept. start: the position of the next token.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        read: Read,
        arrays: Arrays,
        max_seq_len: int,
        quantized: Float8Layers | None = None,
    ) -> None:
        self.spec, self.layer, self.arrays, self.xp = spec, layer, arrays, arrays.xp
        self.taps: dict[str, Array] = {}
        self.cache: dict[str, Array] | None = None
        self.start = 0
        prefix = layer_prefix(layer)
        self._linears: dict[str, tuple[Array, Array | None, Float8Linear | None]] = {}
        self._norms: dict[str, Array] = {}
        self._plains: dict[str, Array] = {}
        for module in (module for part in spec.parts(layer) for module in part.modules):
            if isinstance(module, Plain):
                self._plains[module.name] = arrays.put(read(prefix + module.name))
                continue
            name = module.module
            if isinstance(module, Norm):
                self._norms[name] = arrays.put(read(f"{prefix}{name}.weight"))
                continue
            float8 = quantized(prefix + name) if quantized else None
            if float8 is not None:
                weight, bias = arrays.decoded(float8.weight, float8.scale), float8.bias
            else:
                weight = arrays.put(read(f"{prefix}{name}.weight"))
                bias = read(f"{prefix}{name}.bias") if module.has_bias else None
            self._linears[name] = (weight, None if bias is None else arrays.put(bias), float8)
        cos, sin = rope_tables(spec.rope, spec.rotary_dim, max_seq_len)
        self.cos, self.sin = arrays.put(cos), arrays.put(sin)
        self._masks: dict[tuple[int, int], Array] = {}

    def norm(self, value: Array, module: str, epsilon: float | None = None) -> Array:
        """RMS norm of value [..., size]; epsilon: None, the decoder's own."""
        mean_square = self.xp.mean(value * value, -1, keepdims=True)
        epsilon = self.spec.rms_norm_eps if epsilon is None else epsilon
        return value / self.xp.sqrt(mean_square + epsilon) * self._norms[module]

    def plain(self, name: str) -> Array:
        """A tensor that is no linear layer's and no norm's."""
        return self._plains[name]

    def linear(self, value: Array, module: str) -> Array:
        """value [..., in] through a linear layer, in FP8 where it is: [..., out]."""
        weight, bias, float8 = self._linears[module]
        if float8 is not None:
            value = rounded_input(value, float8.input_scale, self.arrays)
        product = value @ weight.T
        return product if bias is None else product + bias

    def cached(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Keys and values [..., kv_heads, seq_len, head_dim], behind those of the cache where there is one."""
        return self.kept("k", k), self.kept("v", v)

    def kept(self, name: str, new: Array) -> Array:
        """What the cache has of that name, and behind it `new` [..., seq_len, width]; without a cache `new` alone."""
        if self.cache is None:
            return new
        self.cache[name] = self.xp.concatenate([self.cache[name], new], -2) if name in self.cache else new
        return self.cache[name]

    def causal_mask(self, length: int, total: int) -> Array:
        """[length, total]: 0 where one of the last `length` positions may look, else minus infinity."""
        if (length, total) not in self._masks:
            hidden: Any = np.triu(np.full((length, total), -np.inf, np.float32), 1 + total - length)
            self._masks[length, total] = self.arrays.put(hidden)
        return self._masks[length, total]


def rounded_input(value: Array, scale: float | None, arrays: Arrays) -> Array:
    """What the FP8 matrix product gets for `value` [..., in]; scale: static, or None: each token's own."""
    if scale is not None:
        return arrays.rounded(value / scale) * scale
    xp = arrays.xp
    token = xp.amax(xp.abs(value), -1, keepdims=True) / E4M3_MAX
    token = xp.clip(token, MIN_TOKEN_SCALE, None)
    return arrays.rounded(value / token) * token
