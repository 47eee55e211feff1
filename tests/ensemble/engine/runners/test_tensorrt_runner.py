"""The TensorRT runner against a fake of TensorRT and CUDA whose engine is ONNX Runtime."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.ensemble.artefacts.tensorrt_api import PlanInfo, TensorRTError
from deepseek_triton.ensemble.engine.runners.base import DeviceSampling, Runner, RunnerError, SamplingRunner
from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from deepseek_triton.ensemble.engine.runners.tensorrt import TensorRTRunner, captured_size
from tests.support.fake_tensorrt import FakeContext, FakeCudaRuntime, FakeEngine, FakeRuntime, FakeTensorRT
from tests.support.tensorrt_graphs import small_spec, write_graph

SLOTS, CHUNK, MAX_SEQ_LEN = 5, 8, 64
PLAN = PlanInfo("tensorrt-rtx", "1.7.1.116", "8.9", "lengths", True, SLOTS, CHUNK, MAX_SEQ_LEN)
Load = Callable[..., TensorRTRunner]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(small_spec(), tmp_path_factory.mktemp("graph"), precision="fp32", max_seq_len=MAX_SEQ_LEN)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCudaRuntime:
    cuda = FakeCudaRuntime()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    return cuda


@pytest.fixture
def api(cuda: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    api = FakeTensorRT(cuda, SLOTS, CHUNK)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", api)
    return api


@pytest.fixture
def load(graph: Path, tmp_path: Path, api: FakeTensorRT) -> Load:
    path = tmp_path / "model.plan"
    path.write_text(str(graph))

    def load(plan: PlanInfo = PLAN, max_num_seqs: int = SLOTS, max_num_batched_tokens: int = CHUNK) -> TensorRTRunner:
        return TensorRTRunner(path, plan, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)

    return load


def ids(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, 320, count)


def generate(runner: Runner) -> list[np.ndarray[Any, Any]]:
    """Prefill in chunks and decode at every batch size twice, prompts arriving in between; every logit that
    comes back."""
    seen, lengths = [], []
    for slot in range(SLOTS):
        prompt = ids(11 + slot, slot)
        for start in range(0, len(prompt), CHUNK):
            seen.append(runner.prefill(slot, prompt[start : start + CHUNK], start).copy())
        lengths.append(len(prompt))
        for _ in range(2):
            seen.append(runner.decode(ids(slot + 1, 99), np.array(lengths)).copy())
            lengths = [length + 1 for length in lengths]
    return seen


def test_logits_are_those_of_the_onnx_runner(load: Load, graph: Path) -> None:
    runner = load()
    for ours, expected in zip(generate(runner), generate(OnnxRunner(graph, max_num_seqs=SLOTS)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        assert np.ptp(expected) > 1e-3
    runner.close()


def test_each_batch_size_is_captured_once_after_one_plain_run(load: Load, api: FakeTensorRT) -> None:
    runner = load()
    generate(runner)
    sizes = [captured_size(n, SLOTS) for n in range(1, SLOTS + 1) for _ in range(2)]
    assert sizes == [1, 1, 2, 2, 4, 4, 4, 4, 5, 5]
    prefill, *decode = api.engines[0].contexts
    assert prefill.profile == 0 and not prefill.is_captured
    assert [context.num_enqueued for context in decode] == [2] * len(set(sizes))  # one that ran, one that was recorded
    assert all(context.profile == 1 and context.is_captured for context in decode)
    assert api.cuda.num_launches == len(sizes) - len(set(sizes))
    runner.close()


def test_cache_tensors_have_one_address_for_input_and_output(load: Load, api: FakeTensorRT) -> None:
    runner = load()
    runner.prefill(3, ids(4), 0)
    addresses = api.engines[0].contexts[0].addresses
    pasts = [name for name in addresses if name.startswith("past_")]
    assert len(pasts) == 4 and len({addresses[name] for name in pasts}) == 4
    for name in pasts:
        assert addresses[name] == addresses[name.replace("past_", "present_")]
    runner.close()


def test_a_rounded_up_batch_leaves_a_prompt_half_way_through_alone(load: Load) -> None:
    runner = load()
    prompt = ids(14, 7)
    runner.prefill(3, prompt[:8], 0)
    alone = runner.prefill(3, prompt[8:], 8).copy()
    runner.prefill(3, prompt[:8], 0)
    for slot in range(3):
        runner.prefill(slot, ids(5, slot), 0)
    runner.decode(ids(3), np.array([5, 5, 5]))  # rounded up to 4: slot 3 is in the batch
    np.testing.assert_array_equal(runner.prefill(3, prompt[8:], 8), alone)
    runner.close()


def test_greedy_tokens_come_from_the_device(load: Load) -> None:
    runner = load()
    greedy = DeviceSampling(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, step=0)
    assert isinstance(runner, SamplingRunner)
    assert runner.can_sample(greedy) and not runner.can_sample(replace(greedy, temperature=0.5))
    for slot in range(3):
        runner.prefill(slot, ids(6, slot), 0)
    logits = runner.decode(ids(3), np.array([6, 6, 6])).copy()
    runner.start_decode(ids(3), np.array([6, 6, 6]), [greedy, None, greedy], [1])
    decoded = runner.finish_decode()
    best = logits.argmax(axis=1)
    assert decoded.tokens.dtype == np.int64 and decoded.tokens.tolist() == best.tolist()
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(decoded.log_probs, expected[np.arange(3), best], atol=1e-5)
    np.testing.assert_array_equal(decoded.logits, logits[[1]])
    runner.close()


def test_a_copied_prefix_goes_on_like_the_original(load: Load) -> None:
    runner = load()
    prompt = ids(7)
    alone = runner.prefill(0, prompt, 0).copy()
    runner.prefill(4, ids(7, 5), 0)
    runner.copy_prefix(0, 4, 5)
    np.testing.assert_array_equal(runner.prefill(4, prompt[5:], 5), alone)
    runner.close()


def test_close_gives_everything_back(load: Load, cuda: FakeCudaRuntime) -> None:
    runner = load()
    generate(runner)
    assert cuda.buffers and cuda.streams and cuda.num_graphs
    runner.close()
    assert not cuda.buffers and not cuda.streams and not cuda.num_graphs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": "1.7.0.5"},
            "the plan was built with tensorrt-rtx 1.7.0.5, here is 1.7.1.116; build again",
        ),
        ({"compute_capability": "12.0"}, "built for compute capability 12.0, this GPU has 8.9; build again"),
    ],
)
def test_a_plan_for_another_version_or_gpu_is_refused_before_it_is_loaded(
    change: dict[str, str], message: str, load: Load, api: FakeTensorRT
) -> None:
    with pytest.raises(RunnerError, match=message):
        load(replace(PLAN, **change))  # type: ignore[arg-type]
    assert not api.engines and not api.cuda.buffers


@pytest.mark.parametrize(("name", "value"), [("max_num_seqs", SLOTS + 1), ("max_num_batched_tokens", CHUNK + 1)])
def test_settings_beyond_the_plan_are_refused(name: str, value: int, load: Load) -> None:
    with pytest.raises(RunnerError, match=f"{name} is {value}, the plan was built for {value - 1}"):
        load(**{name: value})


def test_too_little_memory_is_told_and_nothing_is_kept(load: Load, cuda: FakeCudaRuntime) -> None:
    cuda.memory = 2**16
    with pytest.raises(
        RunnerError, match=r"5 slots of 64 tokens need 1 MiB, the GPU has 0 MiB free; lower max_num_seqs"
    ):
        load()
    assert not cuda.buffers and not cuda.streams


def test_memory_that_runs_out_half_way_is_told_and_nothing_is_kept(load: Load, cuda: FakeCudaRuntime) -> None:
    cuda.memory = (4 * SLOTS * 2 * MAX_SEQ_LEN * 64 * 4) + 4096 + 1000  # the caches and scratch, but no logits
    with pytest.raises(RunnerError, match=r"cudaMalloc.*: out of memory"):
        load()
    assert not cuda.buffers and not cuda.streams


def test_a_plan_that_tensorrt_refuses_is_told_with_its_reason(load: Load, tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"\x00rubbish")
    with pytest.raises(RunnerError, match=r"model.plan can't be loaded by tensorrt-rtx 1.7.1.116: bad magic"):
        load()


def test_no_tensorrt_is_told_with_the_install_command(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(RunnerError, match=r"tensorrt_rtx is not installed; pip install 'tensorrt-rtx>=1\.7'"):
        load()


def test_no_cuda_is_told_with_the_install_command(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(RunnerError, match=r"cuda\.bindings is not installed; pip install cuda-bindings"):
        load()


def test_a_plan_survives_the_manifest() -> None:
    assert PlanInfo.from_dict(PLAN.to_dict()) == PLAN
    with pytest.raises(TensorRTError, match=r"missing or unknown fields \['version'\]"):
        PlanInfo.from_dict({name: value for name, value in PLAN.to_dict().items() if name != "version"})


def test_the_fake_has_only_names_that_the_real_apis_have() -> None:
    api = pytest.importorskip("tensorrt_rtx", reason="pip install 'tensorrt-rtx>=1.7'", exc_type=ImportError)
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="pip install cuda-bindings", exc_type=ImportError)
    pairs = [
        (FakeCudaRuntime, runtime),
        (FakeTensorRT, api),
        (FakeRuntime, api.Runtime),
        (FakeEngine, api.ICudaEngine),
        (FakeContext, api.IExecutionContext),
    ]
    for fake, real in pairs:
        missing = [name for name in vars(fake) if not name.startswith("_") and not hasattr(real, name)]
        assert not missing, f"{real} has no {missing}"
    for holder in ("cudaError_t", "cudaDeviceAttr", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        assert set(vars(getattr(FakeCudaRuntime, holder))) <= set(dir(getattr(runtime, holder)))
    assert hasattr(api.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert importlib.import_module("tensorrt_rtx").DataType.HALF.itemsize == 2
