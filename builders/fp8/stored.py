"""A checkpoint's own FP8 layers in an FP8 engine: the same codes and scales, nothing calibrated or rounded again.

It answers the two questions of the graph's builder, as a Quantizer does for a float checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError
from deepseek_triton.builders.fp8.recipe import Activations, Recipe
from deepseek_triton.builders.fp8.rounding.e4m3 import Float32
from deepseek_triton.builders.graph.float8 import Float8Linear
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import layer_prefix

SMALLEST_SCALE = 2.0**-24  # of float16, above 0: a compiler refuses a scale of 0


def stored_recipe(
    checkpoint: Checkpoint,
    keep: Iterable[str] = (),
    *,
    activations: Activations | None = None,
    takes_blocks: bool = False,
) -> Recipe | None:
    """What the checkpoint's FP8 layers are, as a recipe; None: it has none that can be taken over.

    Args:
        keep: patterns of modules that leave FP8 all the same.
        activations: other than the checkpoint's own, for a target that has no static scales.
        takes_blocks: whether the target has scales for blocks.
    """
    is_block = checkpoint.fp8 is None and takes_blocks
    fp8 = checkpoint.block_fp8 if is_block else checkpoint.fp8
    if fp8 is None:
        return None
    own: Activations = "static" if fp8.is_static else "dynamic"
    linears = [module for layer in range(checkpoint.spec.num_layers) for module in _linears(checkpoint, layer)]
    if not any(module in fp8.modules for module in linears):
        return None
    return Recipe(
        weights="per_block" if is_block else "per_tensor" if fp8.is_per_tensor else "per_channel",
        activations=activations or own,
        rounding="stored",
        scales="stored",
        keep=(*keep, *(module for module in linears if module not in fp8.modules)),
    )


def _linears(checkpoint: Checkpoint, layer: int) -> list[str]:
    parts = checkpoint.spec.parts(layer)
    names = [module.module for part in parts for module in part.modules if isinstance(module, Linear)]
    return [layer_prefix(layer) + name for name in names]


class StoredLinears:
    """Answers `build_graph`: `read` a float weight, and the `quantized` form of a module or None.

    Layers must be asked for in order; one layer is in memory at a time.

    Args:
        recipe: of `stored_recipe`.
        dtype: that must hold the scales.

    Raises:
        BuildError: the checkpoint has no FP8 layers that can be taken over.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, dtype: np.dtype[Any]) -> None:
        fp8 = checkpoint.block_fp8 if recipe.weights == "per_block" else checkpoint.fp8
        if fp8 is None:
            raise BuildError(f"{checkpoint.path} has no FP8 layers with a scale for each weight, row or block of 128")
        self.spec, self.recipe = checkpoint.spec, recipe
        self._checkpoint, self._fp8, self._dtype = checkpoint, fp8, dtype
        self._prefix = ""
        self._weights: dict[str, NDArray[Any]] = {}
        self._linears: dict[str, Float8Linear] = {}

    def read(self, name: str) -> NDArray[Any]:
        """A float weight by its Hugging Face name; an FP8 one dequantised."""
        prefix = _layer_of(name)
        if not prefix:
            return self._checkpoint.read(name)
        self._load(prefix)
        linear = self._linears.get(name.removesuffix(".weight"))
        return self._weights[name] if linear is None or name.endswith(".bias") else linear.dequantized()

    def quantized(self, module: str) -> Float8Linear | None:
        """A module in FP8, or None where the checkpoint or the recipe keeps it."""
        if not (prefix := _layer_of(module)):
            return None
        self._load(prefix)
        return self._linears.get(module)

    def _load(self, prefix: str) -> None:
        if prefix == self._prefix:
            return
        self._prefix, self._weights, self._linears = prefix, {}, {}
        layer = int(prefix.split(".")[2])
        stored = {}
        for short in self.spec.layer_shapes(layer):
            name = prefix + short
            module = name.removesuffix(".weight")
            is_fp8 = module != name and module in self._fp8.modules and self.recipe.precision_of(module) == "fp8"
            if is_fp8:
                stored[module] = self._fp8.read(module)
            else:
                self._weights[name] = self._checkpoint.read(name)
        for tap in self.spec.taps(layer):
            modules = [prefix + module for module in tap.modules if prefix + module in stored]
            scales = [scale for module in modules if (scale := stored[module].input_scale) is not None]
            # Layers that read one value share its codes: the largest of their scales holds for all, as vLLM has it.
            is_static = self.recipe.activations == "static" and scales
            input_scale = float(self._held(max(scales))) if is_static else None
            for module in modules:
                bias = self._weights.get(f"{module}.bias")
                self._linears[module] = Float8Linear(
                    _checked_codes(module, stored[module].codes),
                    self._held(stored[module].scale),
                    input_scale,
                    None if bias is None else np.asarray(bias, np.float32),
                )

            for module in modules:
                del stored[module]
        for module in self._expert_modules(layer):  # each token has a scale of its own there
            if (weight := stored.pop(module, None)) is not None:
                codes = _checked_codes(module, weight.codes)
                self._linears[module] = Float8Linear(codes, self._held(weight.scale), None, None)
        for module, weight in stored.items():  # of a part whose layers no engine has in FP8
            self._weights[f"{module}.weight"] = weight.dequantized()

    def _expert_modules(self, layer: int) -> list[str]:
        stacks = [stack for part in self.spec.parts(layer) for stack in part.stacked.values()]
        return [layer_prefix(layer) + module for stack in stacks for modules in stack for module in modules]

    def _held(self, scale: NDArray[np.float32] | float) -> Float32:
        """A scale as the network's dtype holds it."""
        held = np.asarray(scale, np.float32).astype(self._dtype).astype(np.float32)
        return np.maximum(held, np.float32(SMALLEST_SCALE))


def _checked_codes(module: str, codes: NDArray[Any]) -> NDArray[Any]:
    if ((codes.view(np.uint8) & 0x7F) == 0x7F).any():
        raise CheckpointError(f"{module}.weight holds FP8 codes that stand for no number: the checkpoint is damaged")
    return codes


def _layer_of(name: str) -> str:
    """`model.layers.3.` of a name in a decoder layer; empty for others."""
    parts = name.split(".", 3)
    return "" if parts[:2] != ["model", "layers"] else f"model.layers.{parts[2]}."
