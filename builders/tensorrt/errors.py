"""What can go wrong while an engine is built.

BuildError
└── EngineError               an option, the graph or TensorRT itself
    ├── UnsupportedGpuError   this GPU can't run what was asked for, or none is here to build on ├──
    GraphError            TensorRT can't read the graph, or can't compile it; names the node where it can
    └── NotQuantizedError     a layer that should be FP8 is not
"""

from __future__ import annotations

from deepseek_triton.builders.errors import BuildError


class EngineError(BuildError):
    """The engine can't be built; the message is one line that says why and what to do."""


class UnsupportedGpuError(EngineError):
    """The GPU asked for can't run this, or a GPU is needed and none is here."""


class GraphError(EngineError):
    """TensorRT can't parse or compile the graph."""


class NotQuantizedError(EngineError):
    """The recipe says FP8, the network says otherwise."""
