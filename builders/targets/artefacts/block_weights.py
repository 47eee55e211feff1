"""A checkpoint's linear layers in blocks of integers: rounded here, or as its GGUF file stores them.

It answers the two questions of the graph's builder, as a Quantizer does for FP8.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError
from deepseek_triton.builders.graph.blocks.linear import BlockLinear
from deepseek_triton.builders.graph.blocks.rounding import BLOCK_SIZE, rounded
from deepseek_triton.builders.graph.nodes import EMBEDDING, HEAD
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import layer_prefix

BITS = {"int4": 4, "int8": 8}
STORED = "stored"
BLOCK_PRECISIONS = (*BITS, STORED)


class BlockWeights:
    """Answers `build_graph`: `read` a float weight, and the `quantized` form of a module or None.

    precision: "int4", "int8" or "stored". Embedding and head have eight bits in
    "int4" too. census: what the modules asked for have become → how many of them.

    Raises:
        BuildError: "stored", and the checkpoint stores no layer in blocks of integers.
    """

    def __init__(self, checkpoint: Checkpoint, precision: str) -> None:
        self._checkpoint, self._precision = checkpoint, precision
        spec = checkpoint.spec
        linears = {
            layer_prefix(layer) + module.module: module
            for layer in range(spec.num_layers)
            for part in spec.parts(layer)
            for module in part.modules
            if isinstance(module, Linear)
        }
        self._modules = {name: linear.has_bias for name, linear in linears.items()} | {EMBEDDING: False, HEAD: False}
        stored = checkpoint.blocks if precision == STORED else None
        experts = [
            {layer_prefix(layer) + module for stack in part.stacked.values() for modules in stack for module in modules}
            for layer in range(spec.num_layers)
            for part in spec.parts(layer)
        ]

        def has_blocks(module: str) -> bool:
            return linears[module].in_features % BLOCK_SIZE == 0 if stored is None else module in stored.modules

        # Of a layer all experts are in blocks or none: one node computes them.
        self._float = {module for layer in experts if not all(map(has_blocks, layer)) for module in layer}
        self.census: Counter[str] = Counter()
        self._embedding: list[BlockLinear | None] = []  # asked for twice where the head is tied to it
        self._read: dict[str, NDArray[Any]] = {}
        self._stored = stored
        if precision == STORED and (stored is None or not stored.modules & self._modules.keys()):
            raise BuildError(
                f"{checkpoint.path} stores no weights in blocks of integers, as quantised GGUF files do; "
                "--precision int4 or int8 rounds them"
            )

    def describe(self) -> str:
        """What the layers are now, for the user."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.census.most_common())
        return f"linear layers, embedding and head: {kinds}"

    def read(self, name: str) -> NDArray[Any]:
        """A float weight by its Hugging Face name."""
        return self._read.pop(name) if name in self._read else self._checkpoint.read(name)

    def quantized(self, module: str) -> BlockLinear | None:
        """A linear layer, the embedding or the head in blocks, or None where it stays float.

        It stays float where the file doesn't store it in blocks, or its rows are no multiple of a block. If one expert
        does, all experts of its layer do.

        Raises:
            CheckpointError: it holds numbers that are not finite.
        """
        if module == EMBEDDING:
            self._embedding = self._embedding or [self._linear(module)]
            return self._embedding[0]
        if module not in self._modules:
            return None
        if module in self._float:
            self.census["float32"] += 1
            return None
        linear = self._linear(module)
        if linear is None or not self._modules[module]:
            return linear
        return replace(linear, bias=np.asarray(self.read(f"{module}.bias"), np.float32))

    def _linear(self, module: str) -> BlockLinear | None:
        if self._stored is not None:
            stored = self._stored.read(module) if module in self._stored.modules else None
            self.census["float32" if stored is None else stored.kind] += 1
            if stored is None:
                return None
            return BlockLinear.of_codes(stored.codes, stored.code_bits, stored.scale, stored.offset)
        name = f"{module}.weight"
        weight = self._checkpoint.read(name)
        if weight.shape[1] % BLOCK_SIZE:
            self._read[name] = weight
            self.census["float32"] += 1
            return None
        weight = np.asarray(weight, np.float32)
        if not np.isfinite(weight).all():
            raise CheckpointError(f"{name} holds numbers that are not finite; the checkpoint is corrupt")
        bits = 8 if module in (EMBEDDING, HEAD) else BITS[self._precision]
        self.census[f"int{bits}"] += 1
        return rounded(weight, bits)
