"""Target onnx: the decoder's graph in ONNX Runtime, on a CPU."""

from deepseek_triton.ensemble.engine.runners.onnx.runner import load as load
from deepseek_triton.ensemble.engine.runners.onnx.runner import load_scoring as load_scoring

__all__ = ["load", "load_scoring"]
