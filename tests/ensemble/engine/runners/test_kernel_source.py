"""The CUDA source's entry point has the name by which it is looked up; no GPU, no torch."""

from __future__ import annotations

import re
from pathlib import Path

CUDA = Path(__file__).parents[4] / "ensemble" / "engine" / "runners" / "cuda"


def test_the_kernel_that_is_looked_up_is_in_the_source() -> None:
    source = (CUDA / "kernels" / "persistent_decode.cu").read_text(encoding="utf-8")
    (asked,) = re.findall(r'Kernel\(SOURCE\.read_text\("utf-8"\), "(\w+)"', (CUDA / "persistent_decode.py").read_text())
    (defined,) = re.findall(r'extern "C" __global__.*?\b(\w+)\(const', source, re.DOTALL)
    assert asked == defined
