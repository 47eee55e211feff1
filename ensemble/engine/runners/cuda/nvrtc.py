"""Compile and launch CUDA C++ at run time, with the NVRTC library and the driver that torch uses.

It needs neither a CUDA toolkit nor headers. It knows no model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from deepseek_triton.ensemble.engine.runners.cuda.driver import KernelError, call
from deepseek_triton.ensemble.engine.runners.cuda.startup.kernel_cache import cached_image

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_…


class Kernel:
    """A compiled kernel of the current device's context.

    Args:
        source: CUDA C++ that includes nothing and holds `extern "C"` kernels.
        name: the kernel's.
        macros: defined for the compilation.
        shared_bytes: dynamic shared memory of a block.

    Raises:
        KernelError: with the compiler's first error.
    """

    def __init__(self, source: str, name: str, macros: Mapping[str, object], *, shared_bytes: int) -> None:
        options = options_for(torch.cuda.get_device_capability(), macros)
        image = cached_image(source, options, _version(), lambda: compile_source(source, f"{name}.cu", options)[0])
        self._shared_bytes = shared_bytes
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        torch.cuda.current_stream().synchronize()  # torch's context is this thread's from here on
        call("cuModuleLoadData", ctypes.byref(self._module), image)
        call("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        call("cuFuncSetAttribute", self._function, MAX_DYNAMIC_SHARED_SIZE_BYTES, ctypes.c_int(shared_bytes))

    def launch(self, blocks: int, threads: int, arguments: Sequence[torch.Tensor]) -> None:
        """Launch on the current stream, cooperatively: all blocks run at once. Arguments are the tensors' addresses."""
        values = [ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        call(
            "cuLaunchCooperativeKernel",
            self._function, blocks, 1, 1, threads, 1, 1, self._shared_bytes, stream, pointers,
        )  # fmt: skip


def options_for(capability: tuple[int, int], macros: Mapping[str, object]) -> list[str]:
    """The compiler's options for a device of this compute capability, and this one alone."""
    major, minor = capability
    options = [f"--gpu-architecture=sm_{major}{minor}a", "--std=c++17", "--prec-div=false"]
    return options + [f"-D{macro}={value}" for macro, value in macros.items()]


def compile_source(source: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
    """The image of `source`, and the compiler's messages; no GPU is needed. name: of a file, for messages.

    Raises:
        KernelError: NVRTC is not installed; or with the compiler's first error.
    """
    library, program, size = _library(), ctypes.c_void_p(), ctypes.c_size_t()
    if library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None):
        raise KernelError(f"{name}: NVRTC can't create a program")
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), encoded)
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        messages = log.value.decode()
        if failed:
            lines = [line for line in messages.splitlines() if "error" in line] or ["no reason given"]
            raise KernelError(lines[0])
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, image)
        return image.raw, messages
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def _library() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    names = [f"libnvrtc.so.{major}"]  # found by name where torch has loaded it
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        names += [str(path) for path in Path(folder).glob(f"*/lib/libnvrtc.so.{major}")]
    for name in names:
        try:
            if (path := Path(name)).is_absolute():  # NVRTC asks the loader for its own part by name
                for part in path.parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(part))
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise KernelError(f"libnvrtc.so.{major}, which torch brings, was not found")
