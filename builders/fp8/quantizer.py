"""Quantizer: a checkpoint's weights in FP8, a decoder layer at a time.

It answers the two questions of the graph's builder: a float weight, and an FP8 layer, by name. With compensation,
calibration's windows run through the layers already quantised, so that each layer makes up for what those before it
did. One layer's weights are in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.fp8.calibrate import Calibration, CalibrationError, Report, check_finite
from deepseek_triton.builders.fp8.compensate import SecondMoment, compensated_codes
from deepseek_triton.builders.fp8.e4m3 import Float32, encode, least_error_scale, max_scale, round_trip
from deepseek_triton.builders.fp8.layer_session import embed, layer_session
from deepseek_triton.builders.fp8.recipe import Recipe
from deepseek_triton.builders.fp8.smooth import smooth_layer
from deepseek_triton.builders.graph.decoder import DTYPES
from deepseek_triton.builders.graph.float8 import E4M3_MAX, MIN_TOKEN_SCALE, Float8Linear
from deepseek_triton.builders.graph.nodes import Read
from deepseek_triton.ensemble.decoder.spec import layer_prefix

NETWORK = "fp16"  # of what is not FP8: embedding, head, norms, cache


@dataclass
class _Layer:
    """The decoder layer being written: names without the layer's prefix."""

    weights: dict[str, Float32]
    amax: dict[str, Float32]  # tap → [in] largest magnitudes after smoothing
    linears: dict[str, Float8Linear]


class Quantizer:
    """Answers `build_graph`: `read` a float weight, and the `quantized` form of a module or None.

    Layers must be asked for in order, as the graph's builder does.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        calibration: Calibration,
        *,
        network: str = NETWORK,
        report: Report = lambda what, done, total: None,
    ) -> None:
        self.spec, self.recipe, self.calibration = checkpoint.spec, recipe, calibration
        self._checkpoint, self._report, self._dtype = checkpoint, report, DTYPES[network]
        self._shapes = checkpoint.spec.tensor_shapes()
        self._layer, self._current = -1, _Layer({}, {}, {})
        self._hidden: list[Float32] = []  # of the quantised model before this layer, one array for each window
        self._check_calibration()
        if recipe.rounding == "compensated":
            # Read from another opening: the digest of this one counts each tensor once, in the builder's order.
            embedding = open_checkpoint(checkpoint.path).read("model.embed_tokens.weight")
            self._hidden = embed(embedding, calibration.window_arrays())

    def read(self, name: str) -> NDArray[Any]:
        """A float weight by its Hugging Face name, smoothing folded in."""
        layer, short = _split(name)
        if layer < 0:
            return self._checkpoint.read(name)
        return self._at(layer).weights[short]

    def quantized(self, module: str) -> Float8Linear | None:
        """A module in FP8, or None where the recipe keeps it."""
        layer, short = _split(module)
        return None if layer < 0 else self._at(layer).linears.get(short)

    def _check_calibration(self) -> None:
        taps = [(layer_prefix(layer), tap) for layer in range(self.spec.num_layers) for tap in self.spec.taps(layer)]
        for prefix, tap in taps:
            name, module = prefix + tap.value, f"{prefix}{tap.modules[0]}.weight"
            statistics = self.calibration.taps.get(name)
            if statistics is None or len(statistics.channel_amax) != self._shapes[module][1]:
                raise CalibrationError(f"the activation ranges lack {name} or have another shape: not of this model")

    def _at(self, layer: int) -> _Layer:
        if layer != self._layer:
            if layer != self._layer + 1:
                raise ValueError(f"layer {layer} asked for after layer {self._layer}: layers come in order")
            self._report("quantize", layer, self.spec.num_layers)
            self._layer, self._current = layer, self._load(layer)
            self._quantize(layer, self._current)
        return self._current

    def _load(self, layer: int) -> _Layer:
        prefix = layer_prefix(layer)
        # A copy, for smoothing works in place.
        weights = {
            name: np.array(self._checkpoint.read(prefix + name), np.float32) for name in self.spec.layer_shapes(layer)
        }
        for name, weight in weights.items():
            check_finite(prefix + name, weight)
        taps = [tap.value for tap in self.spec.taps(layer)]
        amax = {tap: np.asarray(self.calibration.taps[prefix + tap].channel_amax, np.float32) for tap in taps}
        if self.recipe.smoothing:
            divided = smooth_layer(weights, amax, self.spec.parts(layer), self.recipe.smoothing)
            amax = {tap: amax[tap] / divided[tap] for tap in taps}
        return _Layer(weights, amax, {})

    def _quantize(self, layer: int, current: _Layer) -> None:
        prefix = layer_prefix(layer)
        readers = {
            tap.value: [module for module in tap.modules if self.recipe.precision_of(prefix + module) == "fp8"]
            for tap in self.spec.taps(layer)
        }
        input_scales = {tap: self._input_scale(current, tap) for tap, modules in readers.items() if modules}
        is_compensated = self.recipe.rounding == "compensated"
        moments = self._moments(layer, current, input_scales) if is_compensated else {}
        for tap, input_scale in input_scales.items():
            current.linears |= self._linears(tap, readers[tap], current, moments.get(tap), input_scale)
        if is_compensated:
            self._advance(layer, current)

    def _input_scale(self, current: _Layer, tap: str) -> float | None:
        if self.recipe.activations == "dynamic":
            return None
        return float(max_scale(current.amax[tap].max(), self._dtype))

    def _moments(self, layer: int, current: _Layer, input_scales: dict[str, float | None]) -> dict[str, SecondMoment]:
        """The second moments of the layer's inputs, in FP8 as they will be, given what the layers before give."""
        moments = {tap: SecondMoment(len(current.amax[tap])) for tap in input_scales}
        taps, read = tuple(input_scales), self._reader(layer, current)
        longest = self.calibration.max_window_len
        with layer_session(self.spec, layer, read, max_seq_len=longest, outputs=taps) as session:
            for hidden in self._hidden:
                _, *values = session.run(hidden, taps)
                for tap, value in zip(taps, values, strict=True):
                    moments[tap].add(_rounded_input(value, input_scales[tap]))
        return moments

    def _advance(self, layer: int, current: _Layer) -> None:
        """Run the windows through the layer as it is now."""

        def quantized(module: str) -> Float8Linear | None:
            return current.linears.get(module.removeprefix(layer_prefix(layer)))

        read, longest = self._reader(layer, current), self.calibration.max_window_len
        with layer_session(self.spec, layer, read, max_seq_len=longest, quantized=quantized) as session:
            for i, hidden in enumerate(self._hidden):
                (self._hidden[i],) = session.run(hidden)
                check_finite(f"the output of layer {layer} in FP8", self._hidden[i])

    def _reader(self, layer: int, current: _Layer) -> Read:
        return lambda name: current.weights[name.removeprefix(layer_prefix(layer))]

    def _linears(
        self,
        tap: str,
        modules: list[str],
        current: _Layer,
        moment: SecondMoment | None,
        input_scale: float | None,
    ) -> dict[str, Float8Linear]:
        """The layers that read one input; they share the work of compensation."""
        statistics = self.calibration.taps[layer_prefix(self._layer) + tap]
        importance = np.asarray(statistics.mean_square) if moment is None else moment.diagonal()
        weights = [current.weights[f"{module}.weight"] for module in modules]
        scales = [self._weight_scale(weight, importance) for weight in weights]
        if moment is None:
            codes = [encode(w, s[:, None] if s.ndim else s) for w, s in zip(weights, scales, strict=True)]
        else:
            rows = [np.broadcast_to(s, len(w)) for w, s in zip(weights, scales, strict=True)]
            stacked = compensated_codes(np.concatenate(weights), np.concatenate(rows), moment)
            codes = np.split(stacked, np.cumsum([len(weight) for weight in weights])[:-1])
        linears = {}
        for module, weight, code, scale in zip(modules, weights, codes, scales, strict=True):
            linear = Float8Linear(code, scale, input_scale, current.weights.get(f"{module}.bias"))
            if self.recipe.bias_correction:
                lost = (weight - linear.dequantized()) @ np.asarray(statistics.mean, np.float32)
                linear = replace(linear, bias=lost if linear.bias is None else linear.bias + lost)
            linears[module] = linear
        return linears

    def _weight_scale(self, weight: Float32, importance: NDArray[Any]) -> Float32:
        rows, columns = weight, importance
        if self.recipe.weights == "per_tensor":
            rows, columns = weight.reshape(1, -1), np.tile(importance, len(weight))
        if self.recipe.scales == "max":
            scale = max_scale(np.abs(rows).max(axis=1), self._dtype)
        else:
            scale = least_error_scale(rows, columns, self._dtype)
        return scale[0] if self.recipe.weights == "per_tensor" else scale


def _rounded_input(value: Float32, scale: float | None) -> Float32:
    """What the FP8 matrix multiply is given for `value` [n, in]."""
    if scale is not None:
        return round_trip(value, scale)
    token = np.abs(value).max(axis=1, keepdims=True) / np.float32(E4M3_MAX)
    return round_trip(value, np.maximum(token, np.float32(MIN_TOKEN_SCALE)))


def _split(name: str) -> tuple[int, str]:
    """`model.layers.3.mlp.up_proj` → (3, "mlp.up_proj"); (-1, name) outside the layers."""
    parts = name.split(".", 3)
    if parts[:2] != ["model", "layers"]:
        return -1, name
    return int(parts[2]), parts[3]
