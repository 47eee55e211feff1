"""The example's own models, written into a repository that holds a text model.

The ResNet runs on ONNX Runtime inside a Python model: the tritonserver of nvidia-pytriton has no onnxruntime backend.
With a plan, Triton's tensorrt backend runs it, with the same tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.repository.check import require_sound
from deepseek_triton.builders.repository.models.config_text import to_text
from deepseek_triton.clients.report import REPORT_SUFFIX
from deepseek_triton.ensemble.protocol.contract import ModelContract, TensorSpec
from deepseek_triton.ensemble.protocol.pipelines import model_name
from deepseek_triton.examples.image_report.classifier import GRAPH_FILE
from deepseek_triton.examples.image_report.contract import (
    FINDER,
    FINDINGS_SUFFIX,
    IMPRESSION_PARAMETER,
    PREPROCESSOR,
    PREPROCESSOR_SUFFIX,
    REPORT,
    RESNET,
    RESNET_SUFFIX,
    steps,
)
from deepseek_triton.examples.image_report.findings import CALIBRATION_FILE
from deepseek_triton.examples.image_report.report import Impression

DATA = Path(__file__).with_name("data")
PLAN_FILE = "model.plan"
NUM_HEADER_LINES = 3
MAX_BATCH_SIZE = 16
MAX_QUEUE_SIZE = 64  # requests that may wait for one of the models
QUEUE_DELAY_US = 2000  # for which a request waits for others to share its batch
HEADER = "# Written by examples/image_report/repository.py, anew with each build.\n"
ADAPTERS = {PREPROCESSOR_SUFFIX: "preprocessor", RESNET_SUFFIX: "resnet", FINDINGS_SUFFIX: "findings"}
MODEL_PY = '''"""What Triton loads; the rest comes with the installed package."""

from deepseek_triton.examples.image_report.models.{} import TritonPythonModel as TritonPythonModel
'''


def add_report_models(
    repository: Path,
    text_model: str,
    data: Path = DATA,
    plan: Path | None = None,
    impression: Impression = "chosen",
) -> None:
    """Write the ensemble `text_model`-report and its own three models; those of `text_model` must be there.

    data: holds the ONNX graph and the calibration. plan: of the same graph, built on the GPU that is to run it.
    impression: a sentence that is made of the findings, or the text model's free text.

    Raises:
        CheckError: the repository can't be served.
    """
    name = model_name(text_model, REPORT_SUFFIX)
    for config in configs(name, text_model, has_plan=plan is not None, impression=impression):
        directory = repository / config.name
        shutil.rmtree(directory, ignore_errors=True)
        version = directory / "1"
        version.mkdir(parents=True)
        (directory / "config.pbtxt").write_text(HEADER + _body(config), encoding="utf-8")
        suffix = config.name.removeprefix(f"{name}-")
        if config.backend == "python":
            (version / "model.py").write_text(MODEL_PY.format(ADAPTERS[suffix]), encoding="utf-8")
        if suffix == RESNET_SUFFIX:
            shutil.copyfile(plan or data / GRAPH_FILE, version / (PLAN_FILE if plan else GRAPH_FILE))
        if suffix == FINDINGS_SUFFIX:
            shutil.copyfile(data / CALIBRATION_FILE, version / CALIBRATION_FILE)
    require_sound(repository)


def configs(
    name: str, text_model: str, *, has_plan: bool = False, impression: Impression = "chosen"
) -> tuple[ModelConfig, ...]:
    """The configurations of the example's own models. has_plan: the ResNet is a TensorRT plan on a GPU."""
    resnet = _plan(RESNET) if has_plan else _python(RESNET)
    parameters = {IMPRESSION_PARAMETER: {"string_value": impression}}
    models = (
        (PREPROCESSOR_SUFFIX, {**_python(PREPROCESSOR), **_batched(1, 0)}),
        (RESNET_SUFFIX, {**resnet, **_batched(MAX_BATCH_SIZE, QUEUE_DELAY_US)}),
        (FINDINGS_SUFFIX, {**_python(FINDER), **_batched(MAX_BATCH_SIZE, 0), "parameters": parameters}),
    )
    parts = (_config({"name": model_name(name, suffix), **values}) for suffix, values in models)
    return (*parts, _ensemble(name, text_model))


def _ensemble(name: str, text_model: str) -> ModelConfig:
    wires = [
        {
            "model_name": step.model,
            "model_version": -1,
            "input_map": dict(step.inputs),
            "output_map": dict(step.outputs),
        }
        for step in steps(name, text_model)
    ]
    return _config(
        {
            "name": name,
            "platform": "ensemble",
            "max_batch_size": 1,
            **_tensors(REPORT),
            "ensemble_scheduling": {"step": wires},
        }
    )


def _python(contract: ModelContract) -> dict[str, Any]:
    return {"backend": "python", **_tensors(contract), "instance_group": [{"count": 1, "kind": "KIND_CPU"}]}


def _plan(contract: ModelContract) -> dict[str, Any]:
    return {
        "platform": "tensorrt_plan",
        "default_model_filename": PLAN_FILE,
        **_tensors(contract),
        "instance_group": [{"count": 1, "kind": "KIND_GPU", "profile": ["0"]}],
    }


def _batched(max_batch_size: int, delay_us: int) -> dict[str, Any]:
    return {
        "max_batch_size": max_batch_size,
        "dynamic_batching": {
            "max_queue_delay_microseconds": delay_us,
            "default_queue_policy": {"max_queue_size": MAX_QUEUE_SIZE},
        },
    }


def _tensors(contract: ModelContract) -> dict[str, Any]:
    def described(spec: TensorSpec) -> dict[str, Any]:
        return {"name": spec.name, "data_type": f"TYPE_{spec.dtype}", "dims": list(spec.dims)}

    return {
        "input": [{**described(spec), "optional": spec.optional} for spec in contract.inputs],
        "output": [described(spec) for spec in contract.outputs],
    }


def _body(config: ModelConfig) -> str:
    """The text without the header that tells how `deepseek-triton configure` changes a model."""
    return "".join(to_text(config).splitlines(keepends=True)[NUM_HEADER_LINES:])


def _config(values: Mapping[str, Any]) -> ModelConfig:
    return json_format.ParseDict(values, ModelConfig())
