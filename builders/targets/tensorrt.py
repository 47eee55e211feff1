"""Target tensorrt: datacenter TensorRT, from NVIDIA's containers. It builds for the GPU of the machine it runs on."""

from __future__ import annotations

from deepseek_triton.builders.targets.artefacts.plan import TensorRTTarget


class DatacenterTarget(TensorRTTarget):
    """Also compiles scoring engines, which Triton's own tensorrt backend runs."""

    name = "tensorrt"
    packages = ("onnx", "tensorrt")
    tasks = ("generate", "score")


TARGET = DatacenterTarget()
