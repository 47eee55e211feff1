"""Where the cuda runner's kernels are tested: on a GPU, else under Triton's interpreter on the CPU.

Import this before anything that imports triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# The interpreter has no bfloat16 products.
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32


def exact_interpreter() -> None:
    """Make the interpreter round to E4M3 as the hardware does: to nearest, ties to even. It truncates some."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    if getattr(convert, "is_exact", False):
        return

    def exact(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.float8e4nv:
            codes = torch.from_numpy(np.array(values, np.float32)).to(torch.float8_e4m3fn)
            return codes.view(torch.uint8).numpy()
        return convert(values, source, target, mode)

    exact.is_exact = True  # type: ignore[attr-defined]
    interpreter._convert_float = exact


if not HAS_GPU:
    exact_interpreter()


@contextmanager
def no_more_memory() -> Iterator[None]:
    """torch can take no more of the GPU's memory in this process, and is seen to have been asked for none."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**30, dtype=torch.uint8, device="cuda")
        yield
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, "memory was asked for"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
