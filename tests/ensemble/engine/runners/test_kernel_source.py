"""Every persistent kernel's entry point has the name by which it is looked up; no GPU, no torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[4] / "ensemble" / "engine" / "runners" / "cuda"
FAMILIES = ("dense", "latent")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_that_is_looked_up_is_in_the_source(family: str) -> None:
    source = (CUDA / "kernels" / "persistent" / f"{family}.cu").read_text(encoding="utf-8")
    (asked,) = re.findall(r'^NAME = "(\w+)"', (CUDA / "persistent" / "kernel.py").read_text(), re.MULTILINE)
    (defined,) = re.findall(r'extern "C" __global__.*?\b(\w+)\(const', source, re.DOTALL)
    assert asked == defined


def test_every_family_has_its_source() -> None:
    sources = {path.stem for path in (CUDA / "kernels" / "persistent").glob("*.cu")} - {"common", "instructions"}
    assert sources == set(FAMILIES)
    for family in FAMILIES:
        assert f'SOURCE: ClassVar[str] = "{family}.cu"' in (CUDA / "persistent" / f"{family}.py").read_text()
