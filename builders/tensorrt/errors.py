"""The errors of compiling an engine.

BuildError
└── EngineError               an option, the graph or TensorRT itself is at fault
    ├── UnsupportedGpuError   the GPU can't run what was asked for, or this machine has none to build on
    ├── GraphError            TensorRT can't read or compile the graph; names the node if it can
    └── NotQuantizedError     a layer that should be FP8 is not
"""

from __future__ import annotations

from deepseek_triton.builders.errors import BuildError


class EngineError(BuildError):
    """The engine can't be built; the message is one line that says why and what to do."""


class UnsupportedGpuError(EngineError):
    """The chosen GPU can't run this, or a GPU is needed and this machine has none."""


class GraphError(EngineError):
    """TensorRT can't parse or compile the graph."""


class NotQuantizedError(EngineError):
    """A layer that the recipe makes FP8 isn't FP8 in the network."""
