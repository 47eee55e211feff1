"""One decoder layer in arrays: hidden states in, hidden states and taps out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from deepseek_triton.builders.fp8.forward.dense_mlp import run_dense_mlp
from deepseek_triton.builders.fp8.forward.gqa import run_attention
from deepseek_triton.builders.fp8.forward.layer_session import layer_session
from deepseek_triton.builders.fp8.forward.mla import run_latent_attention
from deepseek_triton.builders.fp8.forward.moe import run_experts
from deepseek_triton.builders.fp8.forward.values import LayerValues
from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays
from deepseek_triton.builders.graph.nodes import Float8Layers, Read
from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.mla import LatentAttention
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.part import Part
from deepseek_triton.ensemble.decoder.spec import ModelSpec

# (values, part, hidden [seq_len, hidden_size]) → hidden with the part's output added
PARTS: dict[type[Part], Callable[[LayerValues, Any, Array], Array]] = {
    GroupedQueryAttention: run_attention,
    DenseMlp: run_dense_mlp,
    LatentAttention: run_latent_attention,
    MixtureOfExperts: run_experts,
}


class LayerRunner(Protocol):
    """A layer that is ready to run."""

    def run(self, hidden: Array, outputs: Sequence[str] = ()) -> tuple[Array, ...]:
        """hidden [seq_len, hidden] of one window → the layer's own output, then `outputs`, each [seq_len, width]."""


class ArrayLayer:
    """A decoder layer whose parts are all in `PARTS`."""

    def __init__(self, values: LayerValues) -> None:
        self._values = values

    def run(self, hidden: Array, outputs: Sequence[str] = ()) -> tuple[Array, ...]:
        """See LayerRunner."""
        values = self._values
        values.taps.clear()
        with np.errstate(all="ignore"):  # callers check that what leaves is finite
            for part in values.spec.parts(values.layer):
                hidden = PARTS[type(part)](values, part, hidden)
        found = tuple(values.taps[name] for name in outputs)
        values.taps.clear()
        return hidden, *found


class _HostLayer:
    """ONNX Runtime's session of a layer, for hidden states of `arrays`."""

    def __init__(self, session: LayerRunner, arrays: Arrays) -> None:
        self._session, self._arrays = session, arrays

    def run(self, hidden: Array, outputs: Sequence[str] = ()) -> tuple[Array, ...]:
        return tuple(map(self._arrays.put, self._session.run(self._arrays.get(hidden), outputs)))


@contextmanager
def layer_runner(
    spec: ModelSpec,
    layer: int,
    read: Read,
    arrays: Arrays,
    *,
    max_seq_len: int,
    quantized: Float8Layers | None = None,
    outputs: Sequence[str] = (),
) -> Iterator[LayerRunner]:
    """A decoder layer ready to run; see `layer_session`, whose arguments these are.

    arrays: where hidden states are and the layer is computed.
    """
    if all(type(part) in PARTS for part in spec.parts(layer)):
        yield ArrayLayer(LayerValues(spec, layer, read, arrays, max_seq_len, quantized))
        return
    with layer_session(spec, layer, read, max_seq_len=max_seq_len, quantized=quantized, outputs=outputs) as session:
        yield _HostLayer(session, arrays)
