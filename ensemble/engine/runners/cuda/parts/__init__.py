"""The forward pass of each part of a decoder layer: one file a part, composed by decoder.py.

A file holds the part's weights, as they are stored (`ensemble/decoder/` declares them), and one class for each way to
run it: prefill and decode of many rows add to a `Residual`; decode of one row, by matrix-vector kernels, adds to the
residual stream itself. An object of such a class lives for one forward pass over all layers, and owns its scratch
memory.
"""

from __future__ import annotations

from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.mla import LatentAttention
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.part import Part
from deepseek_triton.ensemble.engine.runners.cuda.parts import dense_mlp, gqa, mla, moe
from deepseek_triton.ensemble.engine.runners.cuda.parts.part import CudaPart

PARTS: dict[type[Part], CudaPart] = {
    GroupedQueryAttention: gqa.PART,
    DenseMlp: dense_mlp.PART,
    LatentAttention: mla.PART,
    MixtureOfExperts: moe.PART,
}
