"""Target tensorrt-rtx: TensorRT for RTX has the API of datacenter TensorRT, and so the same runner."""

from deepseek_triton.ensemble.engine.runners.tensorrt import load as load
