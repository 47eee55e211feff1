"""A checkpoint's weights in FP8 without calibration: one pass over the file, one decoder layer in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.calibrate import Report, check_finite
from deepseek_triton.builders.fp8.quantizer import NETWORK, split_name
from deepseek_triton.builders.fp8.recipe import Recipe
from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays, best_arrays
from deepseek_triton.builders.fp8.rounding.e4m3 import Float32, least_weight_error_scale, max_scale
from deepseek_triton.builders.graph.decoder import DTYPES
from deepseek_triton.builders.graph.float8 import Float8Linear
from deepseek_triton.builders.graph.nodes import Read
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix


class WeightQuantizer:
    """Carries out a recipe that needs no calibration. `read` and `quantized` are what `build_graph` asks for.

    Args:
        read: reads the checkpoint's tensors, in the order of `ModelSpec.tensor_shapes`.
        arrays: where weights are rounded; None: the GPU where torch sees one, else the processor.
    """

    def __init__(
        self,
        spec: ModelSpec,
        recipe: Recipe,
        read: Read,
        *,
        network: str = NETWORK,
        report: Report = lambda what, done, total: None,
        arrays: Arrays | None = None,
    ) -> None:
        if recipe.needs_calibration:
            raise ValueError("the recipe needs a calibration")
        self.spec, self.recipe = spec, recipe
        self._read, self._report, self._dtype = read, report, DTYPES[network]
        self._arrays, self._layer = arrays or best_arrays(), -1
        self._weights: dict[str, NDArray[Any]] = {}  # of the layer, names without its prefix

    def read(self, name: str) -> NDArray[Any]:
        """A weight by its Hugging Face name, as the checkpoint stores it."""
        layer, short = split_name(name)
        if layer >= 0:
            return self._at(layer)[short]
        if self._layer == self.spec.num_layers - 1:
            self._report("quantize", self.spec.num_layers, self.spec.num_layers)
        return self._read(name)

    def quantized(self, module: str) -> Float8Linear | None:
        """A module in FP8, or None where the recipe keeps it.

        Raises:
            CalibrationError: its weight isn't finite.
        """
        layer, short = split_name(module)
        if layer < 0 or self.recipe.precision_of(module) != "fp8":
            return None
        weights = self._at(layer)
        weight = weights[f"{short}.weight"]
        placed = self._arrays.place(weight)
        check_finite(f"{module}.weight", self._arrays.row_amax(placed))
        scale = self._scale(placed)
        bias = weights.get(f"{short}.bias")
        codes = self._arrays.encode_rows(placed, np.broadcast_to(scale, len(weight)))
        return Float8Linear(codes, scale, None, None if bias is None else np.asarray(bias, np.float32))

    def _scale(self, placed: Array) -> Float32:
        is_per_tensor = self.recipe.weights == "per_tensor"
        if self.recipe.scales == "max":
            amax = self._arrays.row_amax(placed)
            return max_scale(amax.max() if is_per_tensor else amax, self._dtype)
        return least_weight_error_scale(placed, self._dtype, is_per_tensor=is_per_tensor, arrays=self._arrays)

    def _at(self, layer: int) -> dict[str, NDArray[Any]]:
        if layer != self._layer:
            if layer != self._layer + 1:
                raise ValueError(f"layer {layer} asked for after layer {self._layer}: layers come in order")
            self._report("quantize", layer, self.spec.num_layers)
            self._layer, self._weights = layer, {}  # the last layer's are freed first
            self._weights = {name: self._read(layer_prefix(layer) + name) for name in self.spec.layer_shapes(layer)}
        return self._weights
