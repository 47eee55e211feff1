"""The device of one model: whether it can run the weights, and in which context torch calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError
from deepseek_triton.ensemble.engine.runners.base import OutOfMemoryError, RunnerError
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightSource

FP8_CAPABILITY = (8, 9)
PDL_CAPABILITY = (9, 0)


def check_shape(source: WeightSource, shape: DecoderShape) -> None:
    """Check that the weights are those of such a decoder.

    Raises:
        RunnerError: a tensor is missing, or has another shape.
    """
    try:
        shape.check(source.entries)
    except LayoutError as error:
        raise RunnerError(f"{error}; build the model again") from error


def check_device(source: WeightSource, device: torch.device) -> None:
    """Check that there is a GPU, and that it can multiply the weights.

    Raises:
        RunnerError: torch sees no GPU, or the weights are FP8 and the GPU is older.
    """
    if not torch.cuda.is_available():
        raise RunnerError("torch sees no NVIDIA GPU here; serve this model where there is one")
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY and any(entry.dtype == "F8_E4M3" for entry in source.entries.values()):
        major, minor = capability
        raise RunnerError(
            f"FP8 needs compute capability 8.9 or later, this GPU has {major}.{minor}; build with --precision bf16"
        )


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of `device`; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Let torch's calls go to `stream` and its device."""
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream), torch.no_grad():
        yield


@contextmanager
def attributed() -> Iterator[None]:
    """Turn torch's out-of-memory error into ours, and free cached memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise OutOfMemoryError(f"the GPU has no memory for this step: {str(error).splitlines()[0]}") from error
