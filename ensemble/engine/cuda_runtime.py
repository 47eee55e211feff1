"""Memory, streams and graphs of the CUDA runtime, with exceptions for its errors.

This module wraps `cuda.bindings.runtime`, whose functions return (error, values…). Addresses are plain ints. It knows
nothing about TensorRT or models.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

NON_BLOCKING = 1  # cudaStreamNonBlocking: no implicit order with the default stream


class CudaError(Exception):
    """This machine has no CUDA, or a call failed; one line."""


def load_cuda() -> Cuda:
    """The CUDA of this process.

    Raises:
        CudaError: the bindings aren't installed.
    """
    try:
        return Cuda(importlib.import_module("cuda.bindings.runtime"))
    except ImportError as error:
        raise CudaError("cuda.bindings is not installed; pip install cuda-bindings") from error


def device_compute_capability() -> str | None:
    """The compute capability of this machine's GPU, as "8.9"; None without a GPU or without CUDA's bindings."""
    try:
        return load_cuda().compute_capability()
    except CudaError:
        return None


class Cuda:
    """The current device; one thread may use it at a time."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the function `name` and return its value, if it has one.

        Raises:
            CudaError: it failed.
        """
        error, *values = getattr(self._runtime, name)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            _, text = self._runtime.cudaGetErrorString(error)
            raise CudaError(f"{name}: {text.decode()}")
        return values[0] if len(values) == 1 else tuple(values)

    def compute_capability(self) -> str:
        """The device's compute capability, as "8.9"."""
        attributes = self._runtime.cudaDeviceAttr
        device = self.call("cudaGetDevice")
        parts = (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
        return ".".join(str(self.call("cudaDeviceGetAttribute", part, device)) for part in parts)

    def free_bytes(self) -> int:
        """Bytes of device memory that are free now."""
        return int(self.call("cudaMemGetInfo")[0])

    def allocate(self, num_bytes: int) -> int:
        """The address of `num_bytes` of device memory, all zero."""
        address = int(self.call("cudaMalloc", num_bytes))
        self.call("cudaMemset", address, 0, num_bytes)
        return address

    def free(self, address: int) -> None:
        """Free device memory."""
        self.call("cudaFree", address)

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """A page-locked host array, with which copies overlap the GPU's work; free it with `free_pinned`."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self.call("cudaMallocHost", num_bytes))
        memory = memoryview((ctypes.c_byte * num_bytes).from_address(address))
        return np.ndarray(shape, dtype, buffer=memory)

    def free_pinned(self, array: NDArray[Any]) -> None:
        """Free the memory of an array from `pinned`; the array must not be used again."""
        self.call("cudaFreeHost", array.ctypes.data)

    def to_device(self, address: int, array: NDArray[Any], stream: Any) -> None:
        """Queue a copy of a contiguous pinned array to `address`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def to_host(self, array: NDArray[Any], address: int, stream: Any) -> None:
        """Queue a copy from `address` to a contiguous pinned array."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def copy_rows(self, target: int, source: int, *, pitch: int, width: int, rows: int, stream: Any) -> None:
        """Queue a copy on the device: `rows` pieces of `width` bytes, `pitch` bytes apart in both places."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", target, pitch, source, pitch, width, rows, kind, stream)

    def create_stream(self) -> Any:
        """A stream that doesn't wait for the default one."""
        return self.call("cudaStreamCreateWithFlags", NON_BLOCKING)

    def synchronize(self, stream: Any) -> None:
        """Wait until everything queued on `stream` is done."""
        self.call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream."""
        self.call("cudaStreamDestroy", stream)

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """Capture what `work` queues on `stream` as a graph that can be launched; nothing runs now."""
        # In thread-local mode another thread's cudaMalloc doesn't break this capture.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        finally:  # otherwise the stream would stay in capture
            graph = self.call("cudaStreamEndCapture", stream)
        executable = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)
        return executable

    def launch(self, graph: Any, stream: Any) -> None:
        """Queue a captured graph."""
        self.call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a captured graph."""
        self.call("cudaGraphExecDestroy", graph)
