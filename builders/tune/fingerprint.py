"""Fingerprint of a tuning run: the build, the serving code, the load and the machine.

A journal with another fingerprint is rejected. Files are read; nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from deepseek_triton.builders.repository.pbtxt import to_text
from deepseek_triton.builders.tune.options import TuneError
from deepseek_triton.builders.tune.repository import newest_version
from deepseek_triton.builders.tune.space import Configs
from deepseek_triton.ensemble.artefacts.manifest import SMALL_FILE, installed_versions
from deepseek_triton.ensemble.processes.machine import hardware, read_field

PACKAGES = ("numpy", "onnxruntime", "tokenizers", "torch", "nvidia-pytriton")
CODE = Path(__file__).parents[2] / "ensemble"
GPUS = Path("/proc/driver/nvidia/gpus")


def fingerprint(repository: Path, configs: Configs, load: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint as JSON values by name.

    Args:
        load: the parameters of the load, as JSON values.

    Raises:
        TuneError: a part of the model has no version, or can't be read.
    """
    try:
        return {
            "build": build_digest(repository, configs),
            "code": _digest(path for path in CODE.rglob("*.py")),
            "packages": installed_versions(PACKAGES),
            "machine": machine(),
            **load,
        }
    except OSError as error:
        raise TuneError(f"{error.filename or repository} can't be read: {error.strerror}") from error


def build_digest(repository: Path, configs: Configs) -> str:
    """Return a digest of each part's newest version. Large files count by size: manifests have their digests."""
    versions = (newest_version(repository / name) for name in sorted(configs))
    return _digest(path for version in versions for path in version.rglob("*"))


def configs_digest(configs: Configs) -> str:
    """Return a digest of the configurations."""
    return sha256("\0".join(f"{name}\0{to_text(configs[name])}" for name in sorted(configs)).encode()).hexdigest()[:24]


def machine() -> dict[str, Any]:
    """Return the processor, cores, memory and GPUs."""
    return {**hardware(), "gpus": sorted(read_field(path, "Model") for path in GPUS.glob("*/information"))}


def _digest(paths: Iterable[Path]) -> str:
    digest = sha256()
    for path in sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts):
        size = path.stat().st_size
        digest.update(f"{path.parent.parent.name}/{path.name}\0{size}\0".encode())
        if size <= SMALL_FILE:
            digest.update(sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:24]
