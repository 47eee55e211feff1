"""Decide which TensorRT compiles, and for which GPU.

What enters is a target's name, a precision and perhaps a compute capability; what leaves has all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepseek_triton.builders.tensorrt.errors import EngineError, UnsupportedGpuError
from deepseek_triton.ensemble.artefacts.tensorrt_api import TensorRTError, load_tensorrt
from deepseek_triton.ensemble.engine.cuda_runtime import device_compute_capability

PRECISIONS = ("fp32", "fp16", "fp8")
FP8_COMPUTE_CAPABILITY = "8.9"  # Ada; the first with FP8 matrix multiplication


@dataclass(frozen=True)
class CompileTarget:
    """A TensorRT and the GPU that it builds for. compute_capability: as "8.9"."""

    name: str
    api: Any
    compute_capability: str

    @property
    def version(self) -> str:
        """TensorRT's exact version: a plan loads in no other."""
        return str(self.api.__version__)

    @property
    def cross_compiles(self) -> bool:
        """Whether it builds for GPUs of other machines; then it measures no kernels and has no timing cache."""
        return hasattr(self.api, "ComputeCapability")


def resolve_target(name: str, precision: str, compute_capability: str | None = None) -> CompileTarget:
    """Decide what to build with and for; without a `compute_capability`, for this machine's GPU.

    Raises:
        UnsupportedGpuError: FP8 before 8.9, or a GPU that this TensorRT can't build for.
        EngineError: unknown target or precision, or TensorRT isn't installed.
    """
    if precision not in PRECISIONS:
        raise EngineError(f"precision is {precision!r}, must be one of {', '.join(PRECISIONS)}")
    if compute_capability is not None:
        _check_fp8(precision, compute_capability)
    try:
        api = load_tensorrt(name)
    except TensorRTError as error:
        raise EngineError(str(error)) from error
    device = device_compute_capability()
    chosen = compute_capability or device
    known = _known(api)
    if chosen is None:
        what = f"one of {', '.join(known)}" if known else "none; build on the machine that will serve"
        raise UnsupportedGpuError(f"target {name} needs a GPU, and none is here; give a compute capability: {what}")
    _check_fp8(precision, chosen)
    if known and chosen not in known:
        raise UnsupportedGpuError(
            f"{name} {api.__version__} can't build for compute capability {chosen}; "
            f"it can for {', '.join(known)}; for others use target tensorrt"
        )
    if not known and chosen != device:
        raise UnsupportedGpuError(
            f"target {name} builds for the GPU that is here ({device or 'none'}), not for {chosen}; "
            "build on the machine that will serve"
        )
    return CompileTarget(name, api, chosen)


def parse_compute_capability(text: str) -> tuple[int, int]:
    """ "8.9" → (8, 9)."""
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise EngineError(f"compute capability is {text!r}, must look like 8.9")
    return int(major), int(minor)


def _check_fp8(precision: str, compute_capability: str) -> None:
    found = parse_compute_capability(compute_capability)
    if precision == "fp8" and found < parse_compute_capability(FP8_COMPUTE_CAPABILITY):
        raise UnsupportedGpuError(
            f"FP8 needs compute capability {FP8_COMPUTE_CAPABILITY} or later, this is {compute_capability}; "
            "use --precision fp16"
        )


def _known(api: Any) -> list[str]:
    """The compute capabilities that `api` builds for without a GPU (SM89 → "8.9"); none for datacenter TensorRT."""
    names = (name for name in dir(getattr(api, "ComputeCapability", None)) if name.startswith("SM"))
    numbers = sorted(int(name[2:]) for name in names)
    return [f"{number // 10}.{number % 10}" for number in numbers]
