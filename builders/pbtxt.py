"""Contracts, pipelines and settings → config.pbtxt, through Triton's own ModelConfig protobuf.

A field that Triton doesn't have fails here, at build time. What enters is typed data, what leaves is a
ModelConfig or its text; it reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from builders.errors import BuildError
from ensemble.contract import DETOKENIZER, ENGINE, TOKENIZER, ModelContract, TensorSpec
from ensemble.pipelines import (
    DETOKENIZER_SUFFIX,
    ENGINE_SUFFIX,
    TOKENIZER_SUFFIX,
    Pipeline,
    model_name,
)

__all__ = [
    "ModelConfig",
    "PbtxtError",
    "detokenizer_config",
    "engine_config",
    "ensemble_config",
    "parse_text",
    "to_text",
    "tokenizer_config",
]

TEXT_MAX_BATCH_SIZE = 64  # requests that one call of the tokenizer or detokenizer may take
MAX_QUEUE_SIZE = 4096  # requests that may wait for the tokenizer; Triton refuses one more
HEADER = "# Written by `deepseek-triton build`: change the builder, not this file.\n"


class PbtxtError(BuildError):
    """A configuration that Triton couldn't read."""


def tokenizer_config(served_name: str, parameters: Mapping[str, str] | None = None) -> ModelConfig:
    """The configuration of `served_name`'s tokenizer."""
    config = _text_model(model_name(served_name, TOKENIZER_SUFFIX), TOKENIZER, parameters)
    config.dynamic_batching.default_queue_policy.max_queue_size = MAX_QUEUE_SIZE
    return config


def detokenizer_config(served_name: str, parameters: Mapping[str, str] | None = None) -> ModelConfig:
    """The configuration of `served_name`'s detokenizer."""
    config = _text_model(model_name(served_name, DETOKENIZER_SUFFIX), DETOKENIZER, parameters)
    config.model_transaction_policy.decoupled = True  # a heartbeat is answered with nothing
    return config


def engine_config(served_name: str, parameters: Mapping[str, str]) -> ModelConfig:
    """The configuration of `served_name`'s engine; `parameters` are EngineSettings.to_parameters()."""
    return _model_config(
        {
            **_python_model(model_name(served_name, ENGINE_SUFFIX), ENGINE, parameters),
            # The engine batches by itself, step by step: Triton hands it one sequence at a time.
            "max_batch_size": 1,
            "model_transaction_policy": {"decoupled": True},
        }
    )


def ensemble_config(served_name: str, pipeline: Pipeline) -> ModelConfig:
    """The configuration of the ensemble that clients call; Triton derives itself that it is decoupled."""
    return _model_config(
        {
            "name": served_name,
            "platform": "ensemble",
            "max_batch_size": 1,
            **_tensors(pipeline.contract),
            "ensemble_scheduling": {
                "step": [
                    {
                        "model_name": model_name(served_name, step.model_suffix),
                        "model_version": -1,
                        "input_map": dict(step.input_map),
                        "output_map": dict(step.output_map),
                    }
                    for step in pipeline.steps
                ]
            },
        }
    )


def to_text(config: ModelConfig) -> str:
    """The text of a config.pbtxt file."""
    return HEADER + str(text_format.MessageToString(config, as_utf8=True))


def parse_text(text: str, path: Path) -> ModelConfig:
    """Read the text of the config.pbtxt at `path`.

    Raises:
        PbtxtError: it isn't a ModelConfig; names the file, line and column.
    """
    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        reason = str(error).replace(" : ", ": ", 1).rstrip(".")  # "7:3 : Message type … has no field …."
        raise PbtxtError(f"{path}:{reason}; correct it, or build the repository again") from error


def _text_model(name: str, contract: ModelContract, parameters: Mapping[str, str] | None) -> ModelConfig:
    return _model_config(
        {
            **_python_model(name, contract, parameters or {}),
            "max_batch_size": TEXT_MAX_BATCH_SIZE,
            # No delay: take what has queued up while the last batch ran, never wait for more.
            "dynamic_batching": {"max_queue_delay_microseconds": 0},
        }
    )


def _python_model(name: str, contract: ModelContract, parameters: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "backend": "python",
        **_tensors(contract),
        # KIND_CPU says where Triton places tensors and the instance, not where a runner computes.
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


def _tensors(contract: ModelContract) -> dict[str, Any]:
    return {
        "input": [{**tensor, "optional": spec.optional} for spec, tensor in _described(contract.inputs)],
        # Only inputs can be optional: a model may always leave an output out.
        "output": [tensor for _, tensor in _described(contract.outputs)],
    }


def _described(specs: Iterable[TensorSpec]) -> Iterable[tuple[TensorSpec, dict[str, Any]]]:
    for spec in specs:
        yield spec, {"name": spec.name, "data_type": f"TYPE_{spec.dtype}", "dims": list(spec.dims)}


def _model_config(values: Mapping[str, Any]) -> ModelConfig:
    try:
        return json_format.ParseDict(values, ModelConfig())
    except json_format.ParseError as error:
        raise PbtxtError(f"the configuration of {values.get('name')!r} is no ModelConfig: {error}") from error
