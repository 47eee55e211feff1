"""Calls to the CUDA driver API through ctypes, for functions that torch doesn't offer."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


class KernelError(Exception):
    """A kernel can't be compiled, loaded or launched, or its memory can't be allocated; the message is one line."""


def call(function: str, *arguments: Any) -> None:
    """Call a function of the driver API in the current context: torch's, once torch has used the device.

    Raises:
        KernelError: with the driver's error text.
    """
    library = _library()
    if result := getattr(library, function)(*arguments):
        message = ctypes.c_char_p()
        library.cuGetErrorString(result, ctypes.byref(message))
        raise KernelError(f"CUDA's driver: {function}: {(message.value or b'unknown error').decode()}")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
