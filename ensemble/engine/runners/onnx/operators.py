"""The compiled operators of target onnx (kernels/): products with weights in blocks of integers."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

AVX512, VERSION = 2, 1  # kernels/blocks.h
LIBRARY = Path(__file__).parent / "kernels" / "_blocks.abi3.so"

log = logging.getLogger(__name__)


@functools.cache
def library() -> Path | None:
    """What a session loads; None: it isn't there, or this machine can't run it, which the log says once.

    A graph defines these operators by ONNX Runtime's own, so that a session without the library computes them too.
    """
    reason = _reason_against(LIBRARY)
    if reason is None:
        return LIBRARY
    log.warning("products in blocks are ONNX Runtime's own, slower and larger: %s", reason)
    return None


def _reason_against(path: Path) -> str | None:
    if not path.exists():
        return "the kernels weren't compiled when this package was installed (that needs a C compiler, on x86-64)"
    try:
        compiled = ctypes.CDLL(str(path))
        if compiled.blocks_version() != VERSION:
            return f"{path} is another version's; install this package again"
        instructions = compiled.blocks_instructions(AVX512)
    except (AttributeError, OSError) as error:
        return f"{path} can't be loaded: {error}"
    return None if instructions else "this processor has no AVX2"
