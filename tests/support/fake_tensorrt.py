"""A fake of TensorRT's runtime and of CUDA's, for the runner's tests: its engine is ONNX Runtime.

Device memory is host memory at real addresses. A stream runs nothing before it is synchronised, so that a
result read too early is stale; a capture records instead of running. What NVIDIA's documentation forbids
raises AssertionError: capturing a context that has never run, touching one that was captured, freeing twice.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

Op = Callable[[], object]
ITEMSIZES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class FakeStream:
    def __init__(self) -> None:
        self.pending: list[Op] = []
        self.captured: list[Op] | None = None

    def __int__(self) -> int:
        return id(self)

    def add(self, op: Op) -> None:
        (self.pending if self.captured is None else self.captured).append(op)


class FakeCudaRuntime:
    """Stands in for the module cuda.bindings.runtime."""

    # CUDA's own names
    cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorMemoryAllocation=2)  # noqa: N815
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, compute_capability: str = "8.9", memory: int = 2**30) -> None:
        self.compute_capability, self.memory = compute_capability, memory
        self.buffers: dict[int, Any] = {}
        self.streams: dict[int, FakeStream] = {}
        self.num_launches = 0
        self.num_graphs = 0

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:  # noqa: N802  # CUDA's names
        return 0, {2: b"out of memory"}[error]

    def cudaGetDevice(self) -> tuple[int, int]:  # noqa: N802
        return 0, 0

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:  # noqa: N802
        return 0, int(self.compute_capability.split(".")[attribute - 75])

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, self.memory - sum(map(ctypes.sizeof, self.buffers.values())), self.memory

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:  # noqa: N802
        if size > self.cudaMemGetInfo()[1]:
            return 2, None
        buffer = (ctypes.c_byte * size)(*([0x7F] * min(size, 64)))  # not zero: nobody may rely on it
        self.buffers[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        assert address in self.buffers, "freed twice, or never allocated"
        del self.buffers[address]
        return (0,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemset(self, address: int, value: int, size: int) -> tuple[int]:  # noqa: N802
        ctypes.memset(address, value, size)
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: FakeStream) -> tuple[int]:  # noqa: N802
        stream.add(lambda: ctypes.memmove(to, source, size))
        return (0,)

    def cudaMemcpy2DAsync(  # noqa: N802
        self, to: int, pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: int, stream: FakeStream
    ) -> tuple[int]:
        for row in range(rows):
            self.cudaMemcpyAsync(to + row * pitch, source + row * source_pitch, width, kind, stream)
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, FakeStream]:  # noqa: N802
        stream = FakeStream()
        self.streams[int(stream)] = stream
        return 0, stream

    def cudaStreamSynchronize(self, stream: FakeStream) -> tuple[int]:  # noqa: N802
        assert stream.captured is None, "synchronised inside a capture"
        pending, stream.pending = stream.pending, []
        for op in pending:
            op()
        return (0,)

    def cudaStreamDestroy(self, stream: FakeStream) -> tuple[int]:  # noqa: N802
        del self.streams[int(stream)]
        return (0,)

    def cudaStreamBeginCapture(self, stream: FakeStream, mode: int) -> tuple[int]:  # noqa: N802
        stream.captured = []
        return (0,)

    def cudaStreamEndCapture(self, stream: FakeStream) -> tuple[int, list[Op] | None]:  # noqa: N802
        graph, stream.captured = stream.captured, None
        return 0, graph

    def cudaGraphInstantiate(self, graph: list[Op], flags: int) -> tuple[int, list[Op]]:  # noqa: N802
        self.num_graphs += 1
        return 0, list(graph)

    def cudaGraphDestroy(self, graph: list[Op]) -> tuple[int]:  # noqa: N802
        graph.clear()
        return (0,)

    def cudaGraphLaunch(self, graph: list[Op], stream: FakeStream) -> tuple[int]:  # noqa: N802
        self.num_launches += 1
        for op in graph:
            stream.add(op)
        return (0,)

    def cudaGraphExecDestroy(self, graph: list[Op]) -> tuple[int]:  # noqa: N802
        self.num_graphs -= 1
        graph.clear()
        return (0,)


class FakeILogger:
    def log(self, severity: Any, text: str) -> None:
        raise NotImplementedError


class FakeTensorRT:
    """Stands in for the module tensorrt_rtx; a "plan" is the path of an ONNX graph."""

    __version__ = "1.7.1.116"
    ILogger = FakeILogger
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)

    def __init__(self, cuda: FakeCudaRuntime, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.cuda, self.max_num_seqs, self.max_num_batched_tokens = cuda, max_num_seqs, max_num_batched_tokens
        self.engines: list[FakeEngine] = []

    def Runtime(self, logger: Any) -> FakeRuntime:  # noqa: N802
        return FakeRuntime(self, logger)


class FakeRuntime:
    def __init__(self, api: FakeTensorRT, logger: Any) -> None:
        self._api, self._logger = api, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
        path = Path(serialized_engine.decode(errors="replace"))
        if not path.name.endswith(".onnx"):
            self._logger.log(
                SimpleNamespace(name="ERROR"),
                "IRuntime::deserialize: Error Code 1: Serialization (bad magic)",
            )
            return None
        engine = FakeEngine(self._api, path)
        self._api.engines.append(engine)
        return engine


class FakeEngine:
    device_memory_size_v2 = 4096

    def __init__(self, api: FakeTensorRT, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.api, self.session = api, ort.InferenceSession(str(path), options)
        values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.shapes = {value.name: [d if isinstance(d, int) else -1 for d in value.shape] for value in values}
        self.dtypes = {value.name: np.dtype(ITEMSIZES[value.type]) for value in values}
        self.names = [*self.shapes, "best_id", "best_log_prob"]
        self.contexts: list[FakeContext] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return str(self.names[index])

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.shapes[name]

    def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
        return self.dtypes[name]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present_", "past_") if name.startswith("present_") else None

    def create_execution_context(self, strategy: Any) -> FakeContext:
        assert strategy == FakeTensorRT.ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.memory = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.num_enqueued = 0
        self.is_captured = False

    def set_device_memory(self, memory: int, size: int) -> None:
        assert ctypes.sizeof(self.engine.api.cuda.buffers[memory]) >= size
        self.memory = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return stream_handle in self.engine.api.cuda.streams

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.is_captured, "a captured context must not be touched"
        batch, seq_len = (
            (1, self.engine.api.max_num_batched_tokens) if self.profile == 0 else (self.engine.api.max_num_seqs, 1)
        )
        limits = [d if d >= 0 else (batch if axis == 0 else seq_len) for axis, d in enumerate(self.engine.shapes[name])]
        self.shapes[name] = shape
        return len(shape) == len(limits) and all(1 <= size <= most for size, most in zip(shape, limits, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert not self.is_captured, "a captured context must not be touched"
        self.addresses[name] = memory
        return name in self.engine.names

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = self.engine.api.cuda.streams[stream_handle]
        assert self.profile is not None and self.memory, "the context isn't set up"
        assert set(self.addresses) == set(self.engine.names), "a tensor has no address"
        if stream.captured is not None:
            assert self.num_enqueued, "enqueue once before a capture"
            self.is_captured = True
        self.num_enqueued += 1
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        stream.add(lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        session = self.engine.session
        feeds = {
            name: _view(addresses[name], shapes[name], self.engine.dtypes[name])
            for name in (value.name for value in session.get_inputs())
        }
        for value, result in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            _view(addresses[value.name], result.shape, result.dtype)[...] = result
            if value.name == "logits":
                best = result.argmax(axis=1)[:, None]
                _view(addresses["best_id"], best.shape, np.dtype(np.int32))[...] = best
                below = result - np.take_along_axis(result, best, axis=1)
                log_prob = -np.log(np.exp(below).sum(axis=1, keepdims=True))
                _view(addresses["best_log_prob"], best.shape, np.dtype(np.float32))[...] = log_prob


def _view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    size = int(np.prod(shape)) * dtype.itemsize
    return np.ndarray(shape, dtype, buffer=memoryview((ctypes.c_byte * size).from_address(address)))
