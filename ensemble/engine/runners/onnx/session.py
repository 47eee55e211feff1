"""How both runners on ONNX Runtime open a graph, and run it without denormals.

Where one position gets nearly all of the attention, the others' shares are numbers below 1e-38. A processor
multiplies such denormals many times more slowly: attention over 512 tokens took eight times as long with some weights.
They are set to zero, which doesn't change a sum with the large share in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort

from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.engine.runners.onnx import operators

# glibc's fenv_t on x86-64: seven words of the x87 unit, then MXCSR, whose bits 6 and 15 read and write denormals as 0.
FENV_WORDS, MXCSR, NO_DENORMALS = 8, 7, 0x8040


def open_session(path: Path, num_threads: int) -> ort.InferenceSession:
    """Load a graph on the CPU; num_threads: for one operator, 0 takes every core this process may use.

    Raises:
        RunnerError: the file can't be loaded.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    # Threads that spin between operators gain a tenth on an idle machine and lose half on a busy one; the server,
    # its tokenizer and often its clients share these cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.log_severity_level = 3
    try:
        if (compiled := operators.library()) is not None:
            options.register_custom_ops_library(str(compiled))
        with without_denormals():  # the first session of a process would leave this thread without them
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own classes, RuntimeError among them
        raise RunnerError(f"{path} can't be loaded by ONNX Runtime {ort.__version__}: {error}") from error


@contextlib.contextmanager
def without_denormals() -> Iterator[None]:
    """Set denormals to zero in this thread, which computes beside the session's own threads."""
    if _LIBM is None:
        yield
        return
    state = (ctypes.c_uint32 * FENV_WORDS)()
    _LIBM.fegetenv(state)
    before = state[MXCSR]
    state[MXCSR] = before | NO_DENORMALS
    _LIBM.fesetenv(state)
    try:
        yield
    finally:
        _LIBM.fegetenv(state)
        state[MXCSR] = before
        _LIBM.fesetenv(state)


def _libm() -> ctypes.CDLL | None:
    """None where it isn't glibc on x86-64: ONNX Runtime's own threads are without denormals there, this one isn't."""
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libm.so.6")


_LIBM = _libm()
