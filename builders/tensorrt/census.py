"""Count the layers of a network before it is compiled, so that a build can prove what it built.

What enters is TensorRT's network definition, what leaves is a Census. TensorRT networks are strongly typed:
a matrix multiply whose two operands are dequantised FP8 is an FP8 matrix multiply, and nothing else can be
one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepseek_triton.builders.tensorrt.errors import NotQuantizedError

ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# Layers that may stand between a dequantisation and its matrix multiply: they move values and don't change them.
TRANSPARENT = ("SHUFFLE", "IDENTITY", "UNSQUEEZE", "SQUEEZE")
# A linear layer's node is named after its module, or "<module>.<suffix>" where it consists of several nodes.
NODE_SUFFIXES = (".scaled", ".product")


@dataclass(frozen=True)
class Census:
    """The numbers of a network's layers.

    attention, cache_updates, rotary_embeddings: how many of each. fp8, not_fp8: modules of the linear layers
    by Hugging Face's names, in the network's order.
    """

    num_layers: int
    attention: int
    cache_updates: int
    rotary_embeddings: int
    fp8: tuple[str, ...]
    not_fp8: tuple[str, ...]

    def require_fp8(self, modules: Sequence[str]) -> None:
        """Check that each of `modules` is an FP8 matrix multiply.

        Raises:
            NotQuantizedError: one is missing or in a higher precision.
        """
        wrong = [module for module in modules if module not in self.fp8]
        if not wrong:
            return
        what = "is not FP8" if wrong[0] in self.not_fp8 else "is no matrix multiply"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise NotQuantizedError(
            f"{wrong[0]} {what} in TensorRT's network, though the recipe says FP8{more}; quantise the graph again"
        )

    def summary(self) -> str:
        """The counts on one line."""
        return (
            f"{self.attention} attention, {self.cache_updates} cache updates, "
            f"{self.rotary_embeddings} rotary, "
            f"{len(self.fp8)} FP8 and {len(self.not_fp8)} other matrix multiplies"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest or a report."""
        return asdict(self)


def take_census(api: Any, network: Any) -> Census:
    """Count `network`'s layers."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = Counter(layer.type.name for layer in layers)
    producers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    fp8: list[str] = []
    not_fp8: list[str] = []
    for layer in layers:
        if layer.type == api.LayerType.MATRIX_MULTIPLY:
            is_fp8 = all(_is_dequantized(api, layer.get_input(index), producers) for index in (0, 1))
            (fp8 if is_fp8 else not_fp8).append(_module(layer))
    return Census(
        num_layers=len(layers),
        attention=kinds["ATTENTION_INPUT"],
        cache_updates=kinds["KV_CACHE_UPDATE"],
        rotary_embeddings=kinds["ROTARY_EMBEDDING"],
        fp8=tuple(fp8),
        not_fp8=tuple(not_fp8),
    )


def _is_dequantized(api: Any, tensor: Any, producers: dict[str, Any]) -> bool:
    """Whether `tensor` comes from a dequantisation of FP8."""
    layer = producers.get(tensor.name)
    while layer is not None and layer.type.name in TRANSPARENT:
        layer = producers.get(layer.get_input(0).name)
    if layer is None or layer.type != api.LayerType.DEQUANTIZE:
        return False
    return bool(layer.get_input(0).dtype == api.DataType.FP8)


def _module(layer: Any) -> str:
    """The module whose weight the layer multiplies with."""
    match = ONNX_LAYER.search(layer.metadata)
    name: str = match.group(1) if match else layer.name
    for suffix in NODE_SUFFIXES:
        name = name.removesuffix(suffix)
    return name
