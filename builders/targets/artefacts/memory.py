"""How much memory a model may take where it will be served: this machine's, a GPU's here, or that of a named GPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from deepseek_triton.builders.errors import BuildError

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GIB = 2**30
# Memory in GiB by NVIDIA's name in lower case.
GPUS = {
    "t4": 16, "l4": 24, "l40s": 48, "a10": 24, "a100": 80, "h100": 80, "h200": 141, "b200": 180, "b300": 288,
    "rtx3060": 12, "rtx3090": 24, "rtx4060": 8, "rtx4070": 12, "rtx4080": 16, "rtx4090": 24, "rtx5090": 32,
}  # fmt: skip

# A weight's in each precision, scales and minima of blocks included; of a file's own blocks at most.
BYTES_OF_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int4": 0.75, "int8": 1.125, "stored": 1.125}


@dataclass(frozen=True)
class ServingMemory:
    """num_bytes, and what they are the memory of, for the user."""

    num_bytes: int
    what: str


def host_memory_bytes() -> int:
    """The machine's memory, or the container's limit where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        return min(total, int(CGROUP_LIMIT.read_text()))
    return total


def host_memory(named: str | None) -> ServingMemory:
    """The memory of the machine that serves on its CPU; `named`: GiB, None: this machine's.

    Raises:
        BuildError: `named` is no number of GiB.
    """
    if named is None:
        return ServingMemory(host_memory_bytes(), "this machine")
    if named.lower() in GPUS:
        raise BuildError(f"memory is {named!r}, a GPU, but the model runs on a CPU: give the machine's memory in GiB")
    return ServingMemory(_read_gib(named, "a number of GiB"), f"--memory {named}")


def gpu_memory(named: str | None) -> ServingMemory:
    """The memory of one GPU that serves; `named`: a GPU or GiB, None: the smallest here, else the largest that exists.

    Raises:
        BuildError: `named` is neither.
    """
    if named is not None:
        num_gib = GPUS.get(named.lower().replace(" ", "").removeprefix("nvidia"))
        if num_gib is not None:
            return ServingMemory(num_gib * GIB, f"GPU {named}")
        return ServingMemory(_read_gib(named, f"a number of GiB or one of {', '.join(GPUS)}"), f"--memory {named}")
    if found := _gpus_here():
        return ServingMemory(min(found), "the GPU here")
    name = max(GPUS, key=GPUS.__getitem__)
    return ServingMemory(GPUS[name] * GIB, f"the largest GPU, {name},")


def _read_gib(text: str, wanted: str) -> int:
    with contextlib.suppress(ValueError, OverflowError):
        num_bytes = int(float(text) * GIB)
        if num_bytes > 0:
            return num_bytes
    raise BuildError(f"memory is {text!r}, must be {wanted}")


def _gpus_here() -> list[int]:
    """The bytes of each GPU of this machine."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) * 2**20 for line in done.stdout.split() if line.isdecimal()]
