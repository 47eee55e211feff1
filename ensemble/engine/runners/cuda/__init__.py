"""Target cuda: the decoder on CUDA kernels of its own."""

from deepseek_triton.ensemble.artefacts.cuda_settings import CUDA_SETTINGS as SETTINGS
from deepseek_triton.ensemble.engine.runners.cuda.loading import load as load
from deepseek_triton.ensemble.engine.runners.cuda.loading import load_scoring as load_scoring

__all__ = ["SETTINGS", "load", "load_scoring"]
