"""CUDA's driver, called through ctypes: what torch has no function for. It knows no kernel and no model."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


class KernelError(Exception):
    """A kernel could not be compiled, loaded or launched here, or has no memory that it needs; one line."""


def call(function: str, *arguments: Any) -> None:
    """Call a function of the driver's API in the current context, which is torch's once torch has used the device.

    Raises:
        KernelError: in the driver's words.
    """
    library = _library()
    if result := getattr(library, function)(*arguments):
        message = ctypes.c_char_p()
        library.cuGetErrorString(result, ctypes.byref(message))
        raise KernelError(f"CUDA's driver: {function}: {(message.value or b'unknown error').decode()}")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
