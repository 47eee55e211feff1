"""What every kind of part gives to the decoder: how its weights are read, and its passes over all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.buffers import Prompts
from deepseek_triton.ensemble.engine.runners.cuda.decode_gemv import DecodeGemv
from deepseek_triton.ensemble.engine.runners.cuda.linear import LinearOps
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightLoader


@dataclass(frozen=True)
class Tools:
    """What the parts of a decoder compute with. cos and sin: [max_seq_len, rotary_dim / 2] float32."""

    ops: LinearOps
    shape: DecoderShape
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class DecodeStep:
    """One token of each slot.

    positions: [rows] int64; negative: the row has no token. finished_splits: [slots, kv_heads] int32 zeros, and zeros
    again afterwards. amax: [1] float32, raised to the largest magnitude of a single row's attention output.
    """

    positions: torch.Tensor
    finished_splits: torch.Tensor
    amax: torch.Tensor


# Runs one layer: of attention (residual, weights, the layer's caches), of an MLP (residual, weights); by matrix-vector
# kernels with the residual stream [1, hidden_size] in place of the residual.
Pass = Callable[..., None]


@dataclass(frozen=True)
class CudaPart:
    """One kind of part.

    load: (loader of the layer's tensors, part) → weights, which have `norm` and `matrices`. prefill, decode: a pass
    over all layers that have this part. gemv: a pass of one row by matrix-vector kernels, which adds to the residual
    stream itself.
    """

    load: Callable[[WeightLoader, Any], Any]
    prefill: Callable[[Tools, Any, Prompts], Pass]
    decode: Callable[[Tools, Any, DecodeStep], Pass]
    gemv: Callable[[DecodeGemv, Tools, Any, DecodeStep], Pass]
