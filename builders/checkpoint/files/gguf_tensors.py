"""Where a decoder's tensors lie in a GGUF: one by one, as one of a stack of experts', or in two halves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.files.byte_order import in_native_order
from deepseek_triton.builders.errors import UnsupportedError
from deepseek_triton.ensemble.decoder.mla import KV_B
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts, expert_modules
from deepseek_triton.ensemble.decoder.part import Plain
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

Array = NDArray[Any]
# GGUF's names of what is outside the layers, in Hugging Face's; those of a layer's modules are the parts' own.
OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# A stack of experts' matrices → which of `expert_modules` each of its matrices holds, one behind the other.
STACKS = {"ffn_gate_exps": (0,), "ffn_up_exps": (1,), "ffn_down_exps": (2,), "ffn_gate_up_exps": (0, 1)}
# kv_b_proj, whole, or in newer files its halves.
KV_B_WHOLE, KEY_HALF, VALUE_HALF = "attn_kv_b.weight", "attn_k_b.weight", "attn_v_b.weight"


@dataclass(frozen=True)
class GGUFTensor:
    """One of a decoder's tensors.

    index: which of a stack's; None: the whole tensor. rows: which of its rows; None: all. values: the second half of
    kv_b_proj, [heads, v_head_dim, kv_lora_rank]; the first half, `stored`, lies transposed: [heads, kv_lora_rank,
    qk_nope_head_dim].
    """

    stored: Any
    index: int | None = None
    rows: slice | None = None
    values: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face's, [out, in] for a linear layer."""
        shape = _shape(self.stored)
        if self.values is not None:
            heads, rank, width = shape
            return heads * (width + _shape(self.values)[1]), rank
        shape = shape if self.index is None else shape[1:]
        return shape if self.rows is None else (self.rows.stop - self.rows.start, *shape[1:])

    @property
    def kind(self) -> str:
        """GGUF's name of the type of a matrix; empty for other tensors, and for one that lies in two halves."""
        is_matrix = self.values is None and len(self.shape) == 2
        return str(self.stored.tensor_type.name) if is_matrix else ""

    def data(self, *, is_swapped: bool) -> Array:
        """The bytes of each row, in this machine's order."""
        return _data(self.stored, self.index, self.rows, is_swapped=is_swapped)

    def read(self, name: str, *, is_swapped: bool) -> Array:
        """The numbers, as float32 where they are quantised.

        name: the tensor's, for errors. is_swapped: the file has the other byte order.

        Raises:
            UnsupportedError: gguf can't dequantise this type.
        """
        try:
            own = _dequantized(self.stored, self.index, self.rows, is_swapped=is_swapped)
            if self.values is None:
                return own
            values = _dequantized(self.values, is_swapped=is_swapped)
        except NotImplementedError as error:
            raise UnsupportedError(f"{name} has type {self.stored.tensor_type.name}: {error}") from error
        return np.concatenate([own.transpose(0, 2, 1), values], axis=1).reshape(self.shape)


def decoder_tensors(spec: ModelSpec, tensors: Mapping[str, Any]) -> dict[str, GGUFTensor]:
    """Hugging Face's names, where this project knows a tensor; else the file's own."""
    names, taken = dict(_names(spec)), set[str]()
    found: dict[str, GGUFTensor] = {}
    for layer in range(spec.num_layers):
        prefix, block = layer_prefix(layer), f"blk.{layer}."
        halves = tensors.get(block + KEY_HALF), tensors.get(block + VALUE_HALF)
        if spec.latent is not None and f"{block}{KV_B_WHOLE}" in tensors:
            taken |= {block + KEY_HALF, block + VALUE_HALF}  # files of some converters have both
        elif spec.latent is not None and all(half is not None and len(half.shape) == 3 for half in halves):
            found[f"{prefix}{KV_B}.weight"] = GGUFTensor(halves[0], values=halves[1])
            taken |= {block + KEY_HALF, block + VALUE_HALF}
        if not any(isinstance(part, MixtureOfExperts) for part in spec.parts(layer)):
            continue
        for stack, places in STACKS.items():
            tensor = tensors.get(f"{block}{stack}.weight")
            if tensor is None or len(tensor.shape) != 3:
                continue  # which is then missing, or of the wrong shape
            count, num_rows, _ = _shape(tensor)
            if num_rows % len(places):
                continue
            taken.add(f"{block}{stack}.weight")
            each = num_rows // len(places)
            for expert, (order, place) in product(range(count), enumerate(places)):
                rows = slice(order * each, (order + 1) * each) if len(places) > 1 else None
                found[f"{prefix}{expert_modules(expert)[place]}.weight"] = GGUFTensor(tensor, expert, rows)
    return found | {names.get(name, name): GGUFTensor(tensor) for name, tensor in tensors.items() if name not in taken}


def _names(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Tensors' names in GGUF, and Hugging Face's."""
    pairs = list(OUTSIDE_LAYERS.items())
    for layer in range(spec.num_layers):
        for module in (module for part in spec.parts(layer) for module in part.modules):
            if isinstance(module, Plain):
                yield f"blk.{layer}.{module.gguf}", layer_prefix(layer) + module.name
            elif module.gguf:
                pairs.append((f"blk.{layer}.{module.gguf}", layer_prefix(layer) + module.module))
    for old, new in pairs:
        yield from ((f"{old}.{kind}", f"{new}.{kind}") for kind in ("weight", "bias"))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _data(tensor: Any, index: int | None = None, rows: slice | None = None, *, is_swapped: bool) -> Array:
    """The bytes of a tensor, of one of a stack's, or of some of its rows, which are quantised one by one."""
    data = np.asarray(in_native_order(tensor) if is_swapped else tensor.data)
    if index is not None:
        count, num_rows = _shape(tensor)[:2]
        data = data.reshape(count, num_rows, -1)[index]
    return data if rows is None else data[rows]


def _dequantized(tensor: Any, index: int | None = None, rows: slice | None = None, *, is_swapped: bool) -> Array:
    import gguf

    data = _data(tensor, index, rows, is_swapped=is_swapped)
    shape = _shape(tensor)
    shape = shape if index is None else shape[1:]
    shape = shape if rows is None else (rows.stop - rows.start, *shape[1:])
    with np.errstate(all="ignore"):  # whether weights are finite is checked where they are written
        array: Array = gguf.quants.dequantize(data, tensor.tensor_type)
    return array.reshape(shape)
