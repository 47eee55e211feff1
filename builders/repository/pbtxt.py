"""Contracts, pipelines and settings → config.pbtxt, through Triton's own ModelConfig protobuf.

A field that Triton doesn't have fails here, at build time. What enters is typed data, what leaves is a ModelConfig or
its text; this module reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.models.config_text import to_text
from deepseek_triton.builders.scoring.options import Batching
from deepseek_triton.ensemble.artefacts.tensorrt_api import PLAN_FILE
from deepseek_triton.ensemble.protocol.contract import (
    DETOKENIZER,
    EMBEDDING,
    ENGINE,
    ENSEMBLE,
    HIDDEN_STATE,
    LOGIT_POSITIONS,
    SCORE_ENGINE,
    SCORE_IDS,
    SCORE_TOKENIZER,
    SCORER,
    TARGET_IDS,
    TOKEN_LOG_PROBS,
    TOKENIZER,
    VLLM,
    ModelContract,
    TensorSpec,
)
from deepseek_triton.ensemble.protocol.pipelines import (
    DETOKENIZER_SUFFIX,
    ENGINE_SUFFIX,
    INFER_SUFFIX,
    SCORER_SUFFIX,
    TOKENIZER_SUFFIX,
    VLLM_SUFFIX,
    EnsemblePipeline,
    model_name,
    score_pipeline,
)
from deepseek_triton.ensemble.scoring.rows import LOGIT_COUNTS, LONGEST_ROW, ROW_LENS, TARGET_COUNTS

__all__ = [
    "ModelConfig",
    "PbtxtError",
    "detokenizer_config",
    "engine_config",
    "ensemble_config",
    "infer_config",
    "parse_text",
    "python_config",
    "score_engine_config",
    "score_ensemble_config",
    "score_plan_config",
    "score_tokenizer_config",
    "scorer_config",
    "set_queue_policy",
    "to_text",
    "tokenizer_config",
    "vllm_config",
]

TEXT_MAX_BATCH_SIZE = 64  # requests that one call of the tokenizer or detokenizer may take
MAX_PROMPTS = 64  # prompts that one request may hold


class PbtxtError(BuildError):
    """The configuration is one that Triton couldn't read."""


def tokenizer_config(served_name: str, parameters: Mapping[str, str] | None = None) -> ModelConfig:
    """The configuration of `served_name`'s tokenizer."""
    config = python_config(model_name(served_name, TOKENIZER_SUFFIX), TOKENIZER, parameters)
    # It takes a request in less time than Triton's batcher needs to make a batch, and encodes several at a time.
    config.ClearField("dynamic_batching")
    return config


def detokenizer_config(served_name: str, parameters: Mapping[str, str] | None = None) -> ModelConfig:
    """The configuration of `served_name`'s detokenizer."""
    config = python_config(model_name(served_name, DETOKENIZER_SUFFIX), DETOKENIZER, parameters)
    config.model_transaction_policy.decoupled = True  # a heartbeat has no answer
    return config


def engine_config(served_name: str, parameters: Mapping[str, str]) -> ModelConfig:
    """The configuration of `served_name`'s engine; `parameters` are EngineSettings.to_parameters()."""
    return _model_config(
        {
            **_python_model(model_name(served_name, ENGINE_SUFFIX), ENGINE, parameters),
            # The prompts of one request. The engine forms its own batches, so Triton makes none of several requests.
            "max_batch_size": MAX_PROMPTS,
            "model_transaction_policy": {"decoupled": True},
        }
    )


def infer_config(served_name: str) -> ModelConfig:
    """The configuration of the model that answers `infer` for `served_name`."""
    model = _python_model(model_name(served_name, INFER_SUFFIX), ENSEMBLE, {})
    return _model_config({**model, "max_batch_size": MAX_PROMPTS})


def vllm_config(served_name: str) -> ModelConfig:
    """The configuration of the model of Triton's vLLM backend that `served_name`'s engine asks.

    The backend would complete it itself; the server is started without that.
    """
    return _model_config(
        {
            "name": model_name(served_name, VLLM_SUFFIX),
            "backend": "vllm",
            **_tensors(VLLM),
            "model_transaction_policy": {"decoupled": True},
            "instance_group": [{"count": 1, "kind": "KIND_MODEL"}],  # vLLM takes its GPUs itself
        }
    )


def score_tokenizer_config(served_name: str) -> ModelConfig:
    """The configuration of a scoring model's tokenizer."""
    return _model_config(_ragged_text_model(model_name(served_name, TOKENIZER_SUFFIX), SCORE_TOKENIZER))


def scorer_config(served_name: str, hidden_size: int) -> ModelConfig:
    """The configuration of a scoring model's last step."""
    contract = _with_hidden_size(SCORER, hidden_size)
    return _model_config(_ragged_text_model(model_name(served_name, SCORER_SUFFIX), contract))


def score_engine_config(
    served_name: str, hidden_size: int, batching: Batching, parameters: Mapping[str, str]
) -> ModelConfig:
    """The configuration of a scoring engine that a Python model runs; `parameters` are its settings'."""
    contract = _with_hidden_size(SCORE_ENGINE, hidden_size)
    model = _python_model(model_name(served_name, ENGINE_SUFFIX), contract, parameters)
    return _batched(_ragged(model), batching)


def score_plan_config(served_name: str, hidden_size: int, batching: Batching) -> ModelConfig:
    """The configuration of a scoring engine whose plan Triton's tensorrt backend runs.

    Triton concatenates the rows of ragged requests; the batch inputs say where each row ends.
    """
    contract = _with_hidden_size(SCORE_ENGINE, hidden_size)
    batch_inputs = (
        (ROW_LENS, "BATCH_ITEM_SHAPE", SCORE_IDS),
        (LOGIT_COUNTS, "BATCH_ITEM_SHAPE", LOGIT_POSITIONS),
        (TARGET_COUNTS, "BATCH_ITEM_SHAPE", TARGET_IDS),
        (LONGEST_ROW, "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", SCORE_IDS),
    )
    model = {
        "name": model_name(served_name, ENGINE_SUFFIX),
        "platform": "tensorrt_plan",
        "default_model_filename": PLAN_FILE,
        **_tensors(contract),
        "instance_group": [{"count": 1, "kind": "KIND_GPU", "profile": ["0"]}],
        "batch_input": [
            {"kind": kind, "target_name": [name], "data_type": "TYPE_INT32", "source_input": [source.name]}
            for name, kind, source in batch_inputs
        ],
        "batch_output": [
            {
                "kind": "BATCH_SCATTER_WITH_INPUT_SHAPE",
                "target_name": [TOKEN_LOG_PROBS.name],
                "source_input": [TARGET_IDS.name],
            }
        ],
    }
    return _batched(_ragged(model), batching)


def ensemble_config(served_name: str, pipeline: EnsemblePipeline, max_batch_size: int = MAX_PROMPTS) -> ModelConfig:
    """The configuration of the ensemble that clients call; Triton finds out that it is decoupled."""
    return _model_config(
        {
            "name": served_name,
            "platform": "ensemble",
            "max_batch_size": max_batch_size,
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


def score_ensemble_config(served_name: str, hidden_size: int, batching: Batching, *, embeds: bool) -> ModelConfig:
    """The configuration of a scoring model's ensemble; with `embeds` it gives hidden states too."""
    pipeline = score_pipeline(embeds=embeds)
    pipeline = replace(pipeline, contract=_with_hidden_size(pipeline.contract, hidden_size))
    return ensemble_config(served_name, pipeline, min(batching.max_batch_size, TEXT_MAX_BATCH_SIZE))


def parse_text(text: str, path: Path) -> ModelConfig:
    """Read the text of the config.pbtxt at `path`.

    Raises:
        PbtxtError: it isn't a ModelConfig; names the file, line and column.
    """
    config = ModelConfig()
    try:
        config.CopyFrom(_parsed(text))
    except text_format.ParseError as error:
        reason = str(error).replace(" : ", ": ", 1).rstrip(".")  # "7:3 : Message type … has no field …."
        raise PbtxtError(
            f"{path}:{reason}; correct it, or write it anew with: deepseek-triton configure MODEL --reset-settings"
        ) from error
    return config


@lru_cache(maxsize=64)
def _parsed(text: str) -> ModelConfig:
    """A command reads a model's files several times, and the parser takes milliseconds for each."""
    return text_format.Parse(text, ModelConfig())


def python_config(name: str, contract: ModelContract, parameters: Mapping[str, str] | None = None) -> ModelConfig:
    """The configuration of a quick model of Triton's Python backend; requests that wait share a call."""
    return _model_config(
        {
            **_python_model(name, contract, parameters or {}),
            "max_batch_size": TEXT_MAX_BATCH_SIZE,
            # Without a delay a batch takes what has queued up while the last one ran, and doesn't wait for more.
            "dynamic_batching": {"max_queue_delay_microseconds": 0},
        }
    )


def _ragged_text_model(name: str, contract: ModelContract) -> dict[str, Any]:
    return {
        **_ragged(_python_model(name, contract, {})),
        "max_batch_size": TEXT_MAX_BATCH_SIZE,
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
    }


def _ragged(model: dict[str, Any]) -> dict[str, Any]:
    """Let requests of different lengths share a batch; by default Triton keeps them apart."""
    return {**model, "input": [{**tensor, "allow_ragged_batch": tensor["dims"] == [-1]} for tensor in model["input"]]}


def set_queue_policy(config: ModelConfig, queue_timeout_us: int, max_queue_size: int) -> None:
    """Limit the queue of Triton's batcher; 0: no limit.

    With any limit, Triton 2.51 hands the engine no batch while one is computed. A request that comes meanwhile then
    waits until another one comes, or for half a second: so there is no limit by default. Only with one does Triton heed
    the timeout that a request gives itself.
    """
    config.dynamic_batching.ClearField("default_queue_policy")
    if queue_timeout_us or max_queue_size:
        policy = config.dynamic_batching.default_queue_policy
        policy.default_timeout_microseconds, policy.max_queue_size = queue_timeout_us, max_queue_size
        policy.allow_timeout_override = True


def _batched(model: dict[str, Any], batching: Batching) -> ModelConfig:
    config = _model_config(
        {
            **model,
            "max_batch_size": batching.max_batch_size,
            "instance_group": [{**group, "count": batching.engine_instances} for group in model["instance_group"]],
            "dynamic_batching": {
                "preferred_batch_size": batching.preferred,
                "max_queue_delay_microseconds": batching.timer_us,
            },
        }
    )
    set_queue_policy(config, batching.queue_timeout_us, batching.max_queue_size)
    return config


def _with_hidden_size(contract: ModelContract, hidden_size: int) -> ModelContract:
    """The contract with the width of the hidden state, which depends on the model."""

    def sized(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(
            replace(spec, dims=(hidden_size,)) if spec in (HIDDEN_STATE, EMBEDDING) else spec for spec in specs
        )

    return ModelContract(sized(contract.inputs), sized(contract.outputs))


def _python_model(name: str, contract: ModelContract, parameters: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "backend": "python",
        **_tensors(contract),
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


def _tensors(contract: ModelContract) -> dict[str, Any]:
    return {
        "input": [{**tensor, "optional": spec.optional} for spec, tensor in _described(contract.inputs)],
        # Only inputs are declared optional: a model may leave out any output.
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
