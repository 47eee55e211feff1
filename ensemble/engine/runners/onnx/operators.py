"""The compiled operators of target onnx (kernels/): products with weights in blocks of integers."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

AVX512 = 2  # kernels/blocks.h
LIBRARY = Path(__file__).parent / "kernels" / "_blocks.abi3.so"

log = logging.getLogger(__name__)


@functools.cache
def library() -> Path | None:
    """What a session loads; None: it wasn't compiled when this package was installed, or this processor can't run it.

    A graph defines these operators by ONNX Runtime's own, so that a session without the library computes them too.
    """
    if not LIBRARY.exists():
        log.info("products in blocks are ONNX Runtime's own: there was no C compiler when this was installed")
        return None
    if not ctypes.CDLL(str(LIBRARY)).blocks_instructions(AVX512):
        log.info("products in blocks are ONNX Runtime's own: this processor has no AVX2")
        return None
    return LIBRARY
