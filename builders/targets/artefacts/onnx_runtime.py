"""What the installed ONNX Runtime runs, and what a graph asks of the one that loads it."""

from __future__ import annotations

from importlib.metadata import version as package_version

from deepseek_triton.builders.errors import BuildError

# opset → the first ONNX Runtime that runs every operator of the graph in it
ONNX_RUNTIME_FOR_OPSET = {24: (1, 24), 23: (1, 23)}
SCORING_OPSET = 24
# FP8 products are computed since 1.25; 1.29 makes integer products of them when it optimises, and refuses those.
ONNX_RUNTIME_FOR_FP8, WITHOUT_FP8 = (1, 25), (1, 29)


def newest_opset() -> int:
    """The newest opset that the installed ONNX Runtime runs; Python 3.10 has none later than 1.23.

    Raises:
        BuildError: it runs none.
    """
    installed = _installed()
    for opset, needed in ONNX_RUNTIME_FOR_OPSET.items():
        if installed >= needed:
            return opset
    raise BuildError(f"onnxruntime {package_version('onnxruntime')} is too old; pip install 'onnxruntime>=1.23'")


def _installed() -> tuple[int, ...]:
    return tuple(int(part) for part in package_version("onnxruntime").split(".")[:2])


def check_fp8(precision: str) -> None:
    """Raise `BuildError` if the installed ONNX Runtime can't run the graph of this precision."""
    if precision == "fp8" and (_installed() < ONNX_RUNTIME_FOR_FP8 or _installed() == WITHOUT_FP8):
        raise BuildError(
            f"onnxruntime {package_version('onnxruntime')} can't run FP8; pip install 'onnxruntime>=1.25,!=1.29.*'"
        )


def required_packages(opset: int, precision: str) -> dict[str, str]:
    """Package → the lowest version that loads a graph of this opset and precision."""
    lowest = ONNX_RUNTIME_FOR_OPSET[opset]
    if precision == "fp8":
        lowest = max(lowest, ONNX_RUNTIME_FOR_FP8)
    return {"onnxruntime": ".".join(map(str, lowest))}
