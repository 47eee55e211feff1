"""What a figure was measured on."""

from __future__ import annotations

import platform
from datetime import date

from deepseek_triton.ensemble.artefacts.manifest import installed_versions
from deepseek_triton.ensemble.processes.machine import hardware

PACKAGES = ("numpy", "onnxruntime", "tokenizers", "torch", "transformers", "tritonclient", "nvidia-pytriton")


def describe() -> dict[str, object]:
    """Processor, cores, memory in GiB, versions and date."""
    return {
        **hardware(),
        "python": platform.python_version(),
        "versions": installed_versions(PACKAGES),
        "date": date.today().isoformat(),
    }
