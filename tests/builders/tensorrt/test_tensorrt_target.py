"""Tests that need no TensorRT: messages, progress, targets, the timing cache, the inspector's table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

import deepseek_triton.builders.tensorrt.compiler as target_module
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8 import plan
from deepseek_triton.builders.fp8.plan import Rates, estimated_seconds, planned
from deepseek_triton.builders.fp8.recipe import RECIPES
from deepseek_triton.builders.fp8.rounding.arrays import Arrays
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets import target_named
from deepseek_triton.builders.tensorrt.compile import CompileJob, _load_timing_cache
from deepseek_triton.builders.tensorrt.compiler import CompileTarget, resolve_target
from deepseek_triton.builders.tensorrt.errors import EngineError, UnsupportedGpuError
from deepseek_triton.builders.tensorrt.inspector import EngineLayer, parse_layers
from deepseek_triton.builders.tensorrt.progress import ProgressTracker
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically
from deepseek_triton.ensemble.artefacts.tensorrt_api import Messages
from deepseek_triton.ensemble.engine.cuda_runtime import device_compute_capability
from tests.support.fake_tensorrt import FakeCudaRuntime
from tests.support.tensorrt_graphs import small_spec

DATACENTER = SimpleNamespace(__version__="10.15.1.29")  # builds for the GPU that is here: no ComputeCapability


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def gpu(compute_capability: str | None) -> None:
        monkeypatch.setattr(target_module, "device_compute_capability", lambda: compute_capability)
        monkeypatch.setitem(sys.modules, "tensorrt", DATACENTER)

    return gpu


def test_datacenter_tensorrt_builds_for_the_gpu_that_is_here(gpu: Any) -> None:
    gpu("9.0")
    for asked in (None, "9.0"):
        target = resolve_target("tensorrt", "fp8", asked)
        assert (target.compute_capability, target.version) == ("9.0", "10.15.1.29")
        assert not target.cross_compiles


@pytest.mark.parametrize(
    ("here", "precision", "asked", "message"),
    [
        ("9.0", "fp16", "10.0", r"builds for the GPU that is here \(9.0\), not for 10.0"),
        (None, "fp16", "9.0", r"builds for the GPU that is here \(none\), not for 9.0"),
        (None, "fp16", None, "needs a GPU, and none is here; .*: none; build on the machine that will serve"),
        ("8.0", "fp8", None, "FP8 needs compute capability 8.9 or later, this is 8.0; use --precision fp16"),
    ],
)
def test_datacenter_tensorrt_refuses_other_gpus(
    here: str | None, precision: str, asked: str | None, message: str, gpu: Any
) -> None:
    gpu(here)
    with pytest.raises(UnsupportedGpuError, match=message):
        resolve_target("tensorrt", precision, asked)


def test_an_old_tensorrt_is_refused(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("9.0")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0"))
    with pytest.raises(EngineError, match=r"tensorrt is 10\.9\.0, 10.15 or later is needed; pip install"):
        resolve_target("tensorrt", "fp16")


def test_the_gpu_is_asked_through_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCudaRuntime("12.0"))
    assert device_compute_capability() == "12.0"
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert device_compute_capability() is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([graph.h:1295: attach] CheckException: "
            "ops.cpp:59: CHECK(op->is_decomposable()) failed. Attention operation was not supported by a\n"
            "dedicated kernel.  (See https://docs.example/transformers.html for shapes.)",
            "Attention operation was not supported by a dedicated kernel",
        ),
        (
            "ITensor::getDimensions: Error Code 4: API Usage Error (mm: `A` is of type Half and `B` is of type "
            "Float. In validateTypes at /_src/optimizer/matrixMultiplyNode.cpp:38)",
            "mm: `A` is of type Half and `B` is of type Float",
        ),
        (
            "WeightsContext.cpp:203: Failed to open file: /tmp/model.data",
            "Failed to open file: /tmp/model.data",
        ),
    ],
)
def test_tensorrt_errors_become_one_line(text: str, expected: str) -> None:
    messages = Messages()
    messages.add("ERROR", "checkMacros.cpp: Cuda Runtime (CUDA driver version is insufficient)")  # no GPU: no error
    messages.add("ERROR", "ModelImporter.cpp:142: --- Begin node ---")
    messages.add("ERROR", text)
    messages.add("ERROR", "what failed because of it")
    assert messages.reason() == expected


def test_progress_of_nested_phases_only_grows() -> None:
    seen: list[int] = []
    tracker = ProgressTracker(lambda what, done, total: seen.append(done))
    tracker.phase_start("build", None, 2)
    tracker.phase_start("time", "build", 4)
    for step in range(4):
        assert tracker.step_complete("time", step)
    tracker.phase_finish("time")
    tracker.phase_start("time", "build", 2)  # TensorRT runs a phase of one name again: no step back
    tracker.step_complete("time", 0)
    tracker.phase_finish("time")
    tracker.step_complete("build", 0)
    tracker.phase_finish("build")
    assert seen == [125, 250, 375, 500, 1000]


def test_a_cancelled_build_is_stopped_at_its_next_step() -> None:
    seen: list[int] = []
    tracker = ProgressTracker(lambda what, done, total: seen.append(done))
    tracker.phase_start("build", None, 2)
    assert tracker.step_complete("build", 0)
    tracker.cancel()
    assert not tracker.step_complete("build", 1)
    assert seen == [500]


class FakeConfig:
    """IBuilderConfig's timing cache: takes back what the same TensorRT wrote."""

    def __init__(self) -> None:
        self.used: bytes | None = None

    def create_timing_cache(self, serialized_timing_cache: bytes) -> bytes:
        return serialized_timing_cache

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.used = cache
        return cache in (b"", b"ours")


@pytest.mark.parametrize(("stored", "used"), [(None, b""), (b"ours", b"ours"), (b"another's", b"")])
def test_a_timing_cache_is_kept_and_one_of_another_gpu_is_not_used(
    stored: bytes | None, used: bytes, tmp_path: Path
) -> None:
    path, config = tmp_path / "timing.cache", FakeConfig()
    if stored is not None:
        path.write_bytes(stored)
    job = CompileJob(
        CompileTarget("tensorrt", DATACENTER, "9.0"), onnx.ModelProto(), Path("x"), "fp16", (), (), timing_cache=path
    )
    assert _load_timing_cache(config, job) == config.used == used


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(EngineError, match="directory: Is a directory"):
        write_atomically(tmp_path / "directory", b"plan", EngineError)
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]
    with pytest.raises(EngineError, match=r"model\.plan: No such file or directory"):
        write_atomically(tmp_path / "missing" / "model.plan", b"plan", EngineError)


def test_the_inspectors_table_is_read() -> None:
    tensor = {"Name": "x", "Dimensions": [1], "Format/Datatype": "FP8"}
    layers = [
        {"Name": "q_proj", "LayerType": "gemm", "Inputs": [tensor, tensor], "Outputs": [tensor]},
        "a bare name",
    ]
    assert parse_layers(json.dumps({"Layers": layers, "Bindings": []})) == (
        EngineLayer("q_proj", "gemm", ("FP8", "FP8"), ("FP8",)),
        EngineLayer("a bare name", "", (), ()),
    )


def test_compiling_counts_in_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, target = small_spec(num_layers=12, hidden_size=512, vocab_size=1024), target_named("tensorrt-rtx")
    seconds = target.compile_seconds(spec)
    assert 3 < seconds < 12 and target_named("tensorrt").compile_seconds(spec) == 0
    rates = Rates(flops=1e15, weights=1e15, column_s=0, element_s=0)
    monkeypatch.setattr(plan.Rates, "measured", lambda arrays: rates)
    monkeypatch.setattr(plan, "best_arrays", Arrays)
    said: list[str] = []
    for spare, recipe in ((10, "default"), (-1, "fast")):
        needed = estimated_seconds(RECIPES["default"], spec, rates, 12000, is_gpu=False)
        options = BuildOptions(
            tmp_path, "m", target="tensorrt-rtx", precision="fp8", budget=(seconds + needed + spare) / 60
        )
        assert planned(options, spec, said.append, seconds).recipe == recipe


@pytest.mark.parametrize("level", [-1, 6])
def test_an_optimisation_level_out_of_range_is_refused(level: int, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=f"builder_optimization_level is {level}, must be 0 to 5"):
        BuildOptions(tmp_path, "m", target="tensorrt-rtx", precision="fp16", builder_optimization_level=level)
    with pytest.raises(BuildError, match="builder_optimization_level is for TensorRT, the target is onnx"):
        BuildOptions(tmp_path, "m", builder_optimization_level=0)


def test_the_command_that_repeats_a_build_has_the_optimisation_level(tmp_path: Path) -> None:
    options = BuildOptions(tmp_path, "m", target="tensorrt-rtx", precision="fp16", builder_optimization_level=0)
    assert "--builder-optimization-level 0" in options.command()
