"""Target tensorrt-rtx: TensorRT for RTX, for GeForce and RTX cards. It builds without a GPU."""

from __future__ import annotations

from deepseek_triton.builders.targets.artefacts.plan import TensorRTTarget
from deepseek_triton.ensemble.decoder.spec import ModelSpec

# CPU seconds of version 1.7.1, FP16, at any optimisation level: 4, 12 and 30 layers of SmolLM2's shape took 1.7, 6.1
# and 25 s, 4 layers of the 1.5B's shape 3.5 s. The time grows faster than the number of layers.
LAYER_S, LAYER_SQUARE_S, PARAMETER_S = 0.32, 0.0155, 1e-8


class RtxTarget(TensorRTTarget):
    """Compiles engines that generate text; Triton's tensorrt backend can't load its plans, so it has no task score."""

    name = "tensorrt-rtx"
    packages = ("onnx", "tensorrt-rtx")

    def compile_seconds(self, spec: ModelSpec) -> float:
        """See Target. It compiles on one core, and times no kernels: a timing cache doesn't shorten it."""
        return (LAYER_S + LAYER_SQUARE_S * spec.num_layers) * spec.num_layers + PARAMETER_S * spec.num_parameters()


TARGET = RtxTarget()
