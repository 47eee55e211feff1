"""This machine's hardware and installed packages, as records of measurements name them. Linux only."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "onnxruntime", "tokenizers", "torch", "transformers", "tritonclient", "nvidia-pytriton")


def describe() -> dict[str, Any]:
    """Processor, cores, memory in GiB, versions and date."""
    from deepseek_triton.ensemble.artefacts.manifest import installed_versions

    return {
        **hardware(),
        "python": platform.python_version(),
        "versions": installed_versions(PACKAGES),
        "date": date.today().isoformat(),
    }


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, and memory in GiB."""
    return {
        "processor": read_field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def read_field(path: Path, name: str) -> str:
    """The value of the first line `name : value` of a file of /proc; empty if there is none."""
    if not path.is_file():
        return ""
    pairs = (line.partition(":") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
