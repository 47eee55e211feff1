"""Target cuda: the decoder on CUDA kernels of its own."""

from deepseek_triton.ensemble.engine.runners.cuda.loading import load as load
