"""Memory that is allocated meanwhile lies in huge pages afterwards; nothing else changes."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path

import numpy as np
import pytest

from deepseek_triton.ensemble.engine.runners.onnx import huge_pages as module
from deepseek_triton.ensemble.engine.runners.onnx.huge_pages import _without, huge_pages

MIB = 2**20
RELEASE = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
needs_huge_pages = pytest.mark.skipif(
    RELEASE < (6, 1) or not module._are_allowed(), reason="this machine gives no huge pages"
)


def measured(field: str) -> int:
    """MiB of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) // 1024


@needs_huge_pages
def test_what_is_allocated_meanwhile_moves_and_keeps_its_contents() -> None:
    earlier = np.ones(32 * MIB, np.uint8)
    before, resident = measured("AnonHugePages"), measured("Rss")
    with huge_pages():
        weights = np.random.default_rng(0).integers(0, 256, 64 * MIB, np.uint8)
        # NumPy asks for huge pages itself, which leaves ours to show on memory that it doesn't advise.
        plain = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        plain.write(weights.tobytes())
        held = measured("AnonHugePages")
    assert measured("AnonHugePages") - held >= 56 and held - before <= 72
    assert plain[:] == weights.tobytes() and earlier.all()
    assert measured("Rss") - resident <= 136


@needs_huge_pages
def test_memory_that_is_hardly_used_takes_no_more() -> None:
    with huge_pages():
        sparse = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in range(0, 64 * MIB, MIB):
            sparse[start] = 1
        resident = measured("Rss")
    assert measured("Rss") - resident <= 2


def test_nothing_is_asked_for_where_it_is_forbidden_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collapse(start: int, end: int) -> None:
        raise AssertionError((start, end))

    monkeypatch.setattr(module, "_collapse", collapse)
    monkeypatch.setattr(module, "SETTING", tmp_path / "enabled")
    for text in (None, "always madvise [never]\n"):
        if text is not None:
            module.SETTING.write_text(text, encoding="ascii")
        with huge_pages():
            memory = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.close()


@pytest.mark.parametrize(
    ("regions", "others", "left"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 4), (6, 7)], [(0, 2), (4, 6), (7, 10)]),
        ([(5, 10), (20, 30)], [(0, 6), (9, 21), (40, 50)], [(6, 9), (21, 30)]),
    ],
)
def test_parts_that_were_there_before_are_left_out(
    regions: module.Regions, others: module.Regions, left: module.Regions
) -> None:
    assert _without(regions, others) == left
