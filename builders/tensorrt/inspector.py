"""List the compiled layers of a plan with TensorRT's engine inspector, which needs a GPU that can load the plan."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.builders.tensorrt.compiler import CompileTarget
from deepseek_triton.ensemble.artefacts.tensorrt_api import Messages, make_logger
from deepseek_triton.ensemble.engine.cuda_runtime import device_compute_capability

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLayer:
    """One compiled layer. inputs, outputs: each tensor's format and datatype by TensorRT's names."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def inspect_plan(target: CompileTarget, path: Path) -> tuple[EngineLayer, ...] | None:
    """The layers of the plan at `path`; None if this machine has no GPU that it was built for."""
    if device_compute_capability() != target.compute_capability:
        return None
    api, messages = target.api, Messages()
    runtime = api.Runtime(make_logger(api, messages))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        log.warning("the plan just built doesn't load here: %s", messages.reason())
        return None
    text = engine.create_engine_inspector().get_engine_information(api.LayerInformationFormat.JSON)
    return parse_layers(text)


def parse_layers(text: str) -> tuple[EngineLayer, ...]:
    """The inspector's JSON; without detailed profiling its layers are bare names."""
    layers = json.loads(text)["Layers"]
    return tuple(_layer(layer) for layer in layers)


def _layer(layer: Mapping[str, Any] | str) -> EngineLayer:
    if isinstance(layer, str):
        return EngineLayer(layer, "", (), ())
    inputs, outputs = (
        tuple(str(tensor.get("Format/Datatype", "")) for tensor in layer.get(key, ())) for key in ("Inputs", "Outputs")
    )
    return EngineLayer(str(layer.get("Name", "")), str(layer.get("LayerType", "")), inputs, outputs)
