"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

from ensemble.manifest import installed_versions

PACKAGES = ("numpy", "onnxruntime", "tokenizers", "torch", "transformers", "tritonclient", "nvidia-pytriton")


def describe() -> dict[str, object]:
    """Processor, cores, memory in GiB, versions and date."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "versions": installed_versions(PACKAGES),
        "date": date.today().isoformat(),
    }
