"""Target tensorrt-rtx: TensorRT for RTX, for GeForce and RTX cards. It builds without a GPU."""

from __future__ import annotations

from deepseek_triton.builders.targets.artefacts.plan import TensorRTTarget


class RtxTarget(TensorRTTarget):
    """Compiles engines that generate text; Triton's tensorrt backend can't load its plans, so it has no task score."""

    name = "tensorrt-rtx"


TARGET = RtxTarget()
