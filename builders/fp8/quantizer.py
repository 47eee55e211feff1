"""Quantizer: converts a checkpoint's weights to FP8, one decoder layer at a time.

The graph's builder asks it for float weights and for FP8 layers by name. With compensation, the calibration's windows
run through the layers that are already quantised, so that a layer also compensates the errors of those before it. The
weights of one layer are in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.fp8.calibrate import (
    Calibration,
    CalibrationError,
    Report,
    check_finite,
    num_experts_of,
)
from deepseek_triton.builders.fp8.forward.layer import layer_runner
from deepseek_triton.builders.fp8.forward.layer_session import embed
from deepseek_triton.builders.fp8.forward.values import rounded_input
from deepseek_triton.builders.fp8.journal import Section
from deepseek_triton.builders.fp8.recipe import Recipe
from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays, best_arrays
from deepseek_triton.builders.fp8.rounding.compensate import SecondMoment, compensated_codes
from deepseek_triton.builders.fp8.rounding.e4m3 import (
    Float32,
    encode,
    least_error_scale,
    least_weight_error_scale,
    max_scale,
)
from deepseek_triton.builders.fp8.rounding.experts import (
    ExpertInputs,
    compensated_expert,
    rounded_expert_layer,
    saw_few,
)
from deepseek_triton.builders.fp8.rounding.host import row_amax
from deepseek_triton.builders.fp8.rounding.smooth import smooth_layer
from deepseek_triton.builders.graph.decoder import DTYPES
from deepseek_triton.builders.graph.float8 import E4M3, Float8Linear
from deepseek_triton.builders.graph.nodes import Read
from deepseek_triton.ensemble.decoder.moe import CHOSEN, expert_modules
from deepseek_triton.ensemble.decoder.moe import NORM as EXPERTS_NORM
from deepseek_triton.ensemble.decoder.spec import layer_prefix

NETWORK = "fp16"  # precision of what isn't FP8: embedding, head, norms, cache


@dataclass
class _Layer:
    """The current decoder layer; names are without the layer's prefix."""

    weights: dict[str, Float32]
    amax: dict[str, Float32]  # tap → [in] largest magnitudes after smoothing
    linears: dict[str, Float8Linear]


class Quantizer:
    """Gives `build_graph` its weights: `read` returns a float weight, `quantized` a module in FP8 or None.

    Layers must be asked for in order, as the graph's builder does it.

    Args:
        checkpoint: freshly opened.
        read: reads its tensors, in the order of `ModelSpec.tensor_shapes`; None: the checkpoint itself.
        arrays: where the work is done; None: the GPU where torch sees one, else the processor.
        section: of the journal: the layers that a killed build had finished; None: nothing is kept.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        calibration: Calibration,
        *,
        network: str = NETWORK,
        report: Report = lambda what, done, total: None,
        read: Read | None = None,
        arrays: Arrays | None = None,
        section: Section | None = None,
    ) -> None:
        self.spec, self.recipe, self.calibration = checkpoint.spec, recipe, calibration
        self._read, self._report, self._dtype = read or checkpoint.read, report, DTYPES[network]
        self._arrays = arrays or best_arrays()
        self._shapes = checkpoint.spec.tensor_shapes()
        self._layer, self._current = -1, _Layer({}, {}, {})
        self._hidden: list[Array] = []  # the quantised model's input of this layer, one array for each window
        self._check_calibration()
        if recipe.rounding == "compensated":
            # Another reader: the digest of `checkpoint` counts each tensor once, in the builder's order.
            embedding = checkpoint.reopened().read("model.embed_tokens.weight")
            self._hidden = list(map(self._arrays.put, embed(embedding, calibration.window_arrays())))
        self._section, self._done = section or Section(), 0
        if (state := self._section.load_windows("hidden")) is not None:
            self._done, self._hidden = int(state[1]), list(map(self._arrays.put, state[0]))

    def read(self, name: str) -> NDArray[Any]:
        """A float weight by its Hugging Face name, with smoothing applied."""
        layer, short = split_name(name)
        if layer < 0:
            if self._layer == self.spec.num_layers - 1:
                self._report("quantize", self.spec.num_layers, self.spec.num_layers)
            return self._read(name)
        return self._at(layer).weights[short]

    def quantized(self, module: str) -> Float8Linear | None:
        """A module in FP8, or None if the recipe keeps it in the network's precision."""
        layer, short = split_name(module)
        return None if layer < 0 else self._at(layer).linears.get(short)

    def _check_calibration(self) -> None:
        taps = [(layer_prefix(layer), tap) for layer in range(self.spec.num_layers) for tap in self.spec.taps(layer)]
        for prefix, tap in taps:
            name, module = prefix + tap.value, f"{prefix}{tap.modules[0]}.weight"
            statistics = self.calibration.taps.get(name)
            if statistics is None or len(statistics.channel_amax) != self._shapes[module][1]:
                raise CalibrationError(f"the activation ranges lack {name} or have another shape: not of this model")
        for layer in range(self.spec.num_layers):
            counts, wanted = self.calibration.experts.get(layer_prefix(layer), ()), num_experts_of(self.spec, layer)
            if len(counts) != wanted:
                raise CalibrationError(
                    f"the activation ranges count the tokens of {len(counts)} experts in layer {layer}, {wanted} are "
                    "needed: not of this model"
                )

    def _at(self, layer: int) -> _Layer:
        if layer != self._layer:
            if layer != self._layer + 1:
                raise ValueError(f"layer {layer} asked for after layer {self._layer}: layers come in order")
            self._report("quantize", layer, self.spec.num_layers)
            self._layer, self._current = layer, self._load(layer)
            if layer < self._done:
                self._current.linears |= self._kept(layer)
            else:
                self._quantize(layer, self._current)
                self._keep(layer, self._current)
        return self._current

    def _load(self, layer: int) -> _Layer:
        prefix = layer_prefix(layer)
        # Copies, because smoothing works in place.
        weights = {name: np.array(self._read(prefix + name), np.float32) for name in self.spec.layer_shapes(layer)}
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
        moments, inputs = self._moments(layer, current, input_scales) if is_compensated else ({}, None)
        for tap, input_scale in input_scales.items():
            current.linears |= self._linears(tap, readers[tap], current, moments.get(tap), input_scale)
        for expert in range(num_experts_of(self.spec, layer)):
            current.linears |= self._expert(prefix, expert, current, inputs)
        if is_compensated:
            self._advance(layer, current)

    def _keep(self, layer: int, current: _Layer) -> None:
        if not self._hidden:  # nothing that takes long
            return
        arrays: dict[str, NDArray[Any]] = {}
        for module, linear in current.linears.items():
            arrays |= {f"{module}.codes": linear.weight.view(np.uint8), f"{module}.scale": linear.scale}
            arrays |= {} if linear.input_scale is None else {f"{module}.input_scale": np.array(linear.input_scale)}
            arrays |= {} if linear.bias is None else {f"{module}.bias": linear.bias}
        self._section.save(f"layer-{layer}", arrays)
        self._section.save_windows("hidden", list(map(self._arrays.get, self._hidden)), np.array(layer + 1))

    def _kept(self, layer: int) -> dict[str, Float8Linear]:
        arrays = self._section.load(f"layer-{layer}")
        if arrays is None:
            raise CalibrationError("the journal of a killed build lacks a layer; remove its directory and build again")
        linears = {}
        for module in (name.removesuffix(".codes") for name in arrays if name.endswith(".codes")):
            input_scale = arrays.get(f"{module}.input_scale")
            linears[module] = Float8Linear(
                arrays[f"{module}.codes"].view(E4M3), arrays[f"{module}.scale"],
                None if input_scale is None else float(input_scale), arrays.get(f"{module}.bias"),
            )  # fmt: skip
        return linears

    def _input_scale(self, current: _Layer, tap: str) -> float | None:
        if self.recipe.activations == "dynamic":
            return None
        return float(max_scale(current.amax[tap].max(), self._dtype))

    def _expert(
        self, prefix: str, expert: int, current: _Layer, inputs: ExpertInputs | None
    ) -> dict[str, Float8Linear]:
        """An expert's matrices in FP8; every recipe scales each of its tokens. inputs: of compensation."""
        recipe, modules = self.recipe, expert_modules(expert)
        wanted = [module for module in modules if recipe.precision_of(prefix + module) == "fp8"]
        if inputs is not None and wanted and not saw_few(self.calibration, prefix, expert):
            rows = inputs.of(expert, self._arrays)
            if len(rows):
                linears = compensated_expert(current.weights, expert, rows, self._weight_scale, self._arrays)
                return {module: linears[module] for module in wanted}
        is_per_tensor, by_maximum = recipe.weights == "per_tensor", recipe.scales == "max"
        return {
            module: rounded_expert_layer(
                current.weights[f"{module}.weight"], self._dtype, self._arrays,
                is_per_tensor=is_per_tensor, by_maximum=by_maximum,
            )
            for module in wanted
        }  # fmt: skip

    def _moments(
        self, layer: int, current: _Layer, input_scales: dict[str, float | None]
    ) -> tuple[dict[str, SecondMoment], ExpertInputs | None]:
        """The second moments of the layer's FP8 inputs, computed behind the quantised layers before it; and what its
        experts read.
        """
        arrays = self._arrays
        moments = {tap: SecondMoment(len(current.amax[tap]), arrays) for tap in input_scales}
        has_experts = num_experts_of(self.spec, layer) > 0
        taps, read = (*input_scales, *((EXPERTS_NORM, CHOSEN) if has_experts else ())), self._reader(layer, current)
        longest, tokens, chosen = self.calibration.max_window_len, list[Array](), list[NDArray[np.int64]]()
        with layer_runner(self.spec, layer, read, arrays, max_seq_len=longest, outputs=taps) as runner:
            for hidden in self._hidden:
                _, *values = runner.run(hidden, taps)
                if has_experts:
                    tokens.append(values[-2])
                    chosen.append(values[-1])
                for (tap, input_scale), value in zip(input_scales.items(), values, strict=False):
                    moments[tap].add(rounded_input(value, input_scale, arrays))
        if not has_experts:
            return moments, None
        return moments, ExpertInputs(arrays.xp.concatenate(tokens), np.concatenate(chosen))

    def _advance(self, layer: int, current: _Layer) -> None:
        """Run the windows through the quantised layer: its outputs are the next layer's inputs."""

        def quantized(module: str) -> Float8Linear | None:
            return current.linears.get(module.removeprefix(layer_prefix(layer)))

        read, longest, xp = self._reader(layer, current), self.calibration.max_window_len, self._arrays.xp
        with layer_runner(self.spec, layer, read, self._arrays, max_seq_len=longest, quantized=quantized) as runner:
            for i, hidden in enumerate(self._hidden):
                (self._hidden[i],) = runner.run(hidden)
                largest = self._arrays.get(xp.amax(xp.abs(self._hidden[i])))
                check_finite(f"the output of layer {layer} in FP8", largest)

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
        """Quantise the layers that read one input; they share its second moment."""
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
            if self.recipe.corrects(layer_prefix(self._layer) + module):
                mean = self._arrays.put(np.asarray(statistics.mean))
                difference = self._arrays.put(weight) - self._arrays.decoded(code, scale)
                lost = self._arrays.get(difference @ mean)
                linear = replace(linear, bias=lost if linear.bias is None else linear.bias + lost)
            linears[module] = linear
        return linears

    def _weight_scale(self, weight: Float32, importance: NDArray[Any]) -> Float32:
        is_per_tensor = self.recipe.weights == "per_tensor"
        if self.recipe.scales == "least_weight_error":
            placed = self._arrays.place(weight)
            return least_weight_error_scale(placed, self._dtype, is_per_tensor=is_per_tensor, arrays=self._arrays)
        rows, columns = weight, importance
        if is_per_tensor:
            rows, columns = weight.reshape(1, -1), np.tile(importance, len(weight))
        if self.recipe.scales == "max":
            scale = max_scale(row_amax(rows), self._dtype)
        else:
            scale = least_error_scale(rows, columns, self._dtype, arrays=self._arrays)
        return scale[0] if is_per_tensor else scale


def split_name(name: str) -> tuple[int, str]:
    """`model.layers.3.mlp.up_proj` → (3, "mlp.up_proj"); (-1, name) outside the layers."""
    parts = name.split(".", 3)
    if parts[:2] != ["model", "layers"]:
        return -1, name
    return int(parts[2]), parts[3]
