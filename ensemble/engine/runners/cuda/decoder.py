"""The decoder's forward pass: kernels in order, over tensors that its caller owns.

It holds the weights; it knows nothing of slots' owners, graphs or the host. Every function only launches: nothing
waits, and nothing depends on a value on the device, so that a call can be captured.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
from numpy.typing import NDArray

from ensemble.cuda_layout import DecoderShape
from ensemble.engine.runners.cuda.decode_one import DecodeOne, LayerTensors, reason_against
from ensemble.engine.runners.cuda.kernels import attention, gemv, rows, skinny
from ensemble.engine.runners.cuda.nvrtc import KernelError
from ensemble.engine.runners.cuda.plan import Plan
from ensemble.engine.runners.cuda.prompts import PackedPrompts
from ensemble.engine.runners.cuda.weights import WeightSource

log = logging.getLogger(__name__)

LOG2_E = 1.0 / math.log(2.0)
DECODE_BLOCK = 64  # cached positions that decode attention reads at a time
PREFILL_TILE = 128  # queries in one program of prefill attention


@dataclass(frozen=True)
class Linear:
    """A fused matrix: weight [out, in], E4M3 codes where there is a scale [out]; bias [out] or None."""

    name: str
    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def is_fp8(self) -> bool:
        """Whether it is multiplied in E4M3."""
        return self.scale is not None


@dataclass(frozen=True)
class Layer:
    """One decoder layer. qk_norms: [2, head_dim], of q and of k."""

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    qk_norms: torch.Tensor | None
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """In the order in which they are used."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class Caches:
    """Keys and values of every layer, each [layers, slots, kv_heads, max_seq_len, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Prompts:
    """`PackedPrompts` on the device, field by field."""

    ids: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    tiles: torch.Tensor
    last_rows: torch.Tensor

    @classmethod
    def of(cls, packed: PackedPrompts, device: torch.device) -> Prompts:
        """New tensors on `device`; nothing waits."""
        return cls(
            *(_staged(getattr(packed, field.name), device).to(device, non_blocking=True) for field in fields(cls))
        )

    def fill(self, packed: PackedPrompts) -> None:
        """Overwrite with prompts of the same sizes; nothing waits."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            tensor.copy_(_staged(getattr(packed, field.name), tensor.device), non_blocking=True)


def _staged(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """`array` where a copy to `device` needn't wait: page-locked, and kept by torch until the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


@dataclass(frozen=True)
class Parts:
    """A matrix product in parts [n, rows, out], still to be added up."""

    tensor: torch.Tensor

    @property
    def count(self) -> int:
        """How many parts there are."""
        return self.tensor.shape[0]

    @property
    def stride(self) -> int:
        """Elements from one part to the next."""
        return int(self.tensor.stride(0))


@dataclass(frozen=True)
class Rows:
    """What a matrix is multiplied with: [rows, in], E4M3 codes where there is a scale [rows]."""

    values: torch.Tensor
    scale: torch.Tensor | None


class Decoder:
    """A decoder on one device.

    Args:
        dtype: of embedding, head, cache and whatever isn't FP8: bfloat16; float32 for checks.
        pdl: let kernels start while their predecessors end (Hopper and later).
    """

    def __init__(
        self,
        shape: DecoderShape,
        source: WeightSource,
        plan: Plan,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.bfloat16,
        pdl: bool = True,
    ) -> None:
        self.shape, self.plan, self.device, self.dtype = shape, plan, device, dtype
        self._options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
        self._pdl = pdl
        self._precision = "ieee" if dtype == torch.float32 else "tf32"
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        )
        shape.check(source.entries)
        self._load(source)
        # Where kernels that take an absent tensor are pointed to.
        self._nothing = torch.zeros(1, dtype=torch.float32, device=device)
        self._attention_amax = torch.zeros(1, dtype=torch.float32, device=device)
        self._mlp_amax = torch.zeros(1, dtype=torch.float32, device=device)
        self._one: DecodeOne | None = None

    def _load(self, source: WeightSource) -> None:
        def load(name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
            tensor = source.load(name, self.device)
            return tensor if dtype is None else tensor.to(dtype)

        def linear(name: str) -> Linear:
            scale = load(f"{name}.scale") if f"{name}.scale" in source.entries else None
            bias = load(f"{name}.bias") if f"{name}.bias" in source.entries else None
            weight = load(f"{name}.weight", self.dtype if scale is None else None)
            return Linear(name.rsplit(".", 1)[-1], weight, scale, bias)

        def layer(prefix: str) -> Layer:
            norms = None
            if self.shape.qk_norm:
                norms = torch.stack([load(f"{prefix}q_norm", self.dtype), load(f"{prefix}k_norm", self.dtype)])
            return Layer(
                load(f"{prefix}attention_norm"), load(f"{prefix}mlp_norm"), norms,
                *(linear(prefix + group) for group in ("qkv", "o", "gate_up", "down")),
            )  # fmt: skip

        self.embedding = load("embedding", self.dtype)
        self.layers = [layer(f"layers.{i}.") for i in range(self.shape.num_layers)]
        self.norm = load("norm")
        head = self.embedding if self.shape.tie_word_embeddings else load("head", self.dtype)
        self.head = Linear("head", head, None, None)
        self.cos, self.sin = load("rope.cos"), load("rope.sin")

    def decode(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        last_tokens: torch.Tensor,
        caches: Caches,
        arrived: torch.Tensor,
    ) -> torch.Tensor:
        """One token for slots 0 … n − 1: logits [n, vocab_size] float32.

        Args:
            ids: [n] int64; a negative one stands for the slot's entry in `last_tokens`.
            positions: [n] int64, where each token goes; negative: the row has none, and its logits mean nothing.
            arrived: [slots, kv_heads] int32 zeros, and zeros again afterwards.
        """
        if len(ids) == 1 and self._one is not None:
            return self._one(ids, positions, last_tokens)
        hidden = self._embed(ids, last_tokens)
        if len(ids) == 1 and self.plan.gemv:
            return self._decode_one(hidden, positions, caches, arrived)
        return self._decode_many(hidden, positions, caches, arrived)

    def prepare(self, caches: Caches) -> None:
        """Compile the single kernel of batch 1 for these caches, if it can run here; else batch 1 takes several."""
        is_fp8 = [linear.is_fp8 for layer in self.layers for linear in layer.matrices]
        if self.plan.gemv:
            reason = reason_against(self.shape, is_fp8, self.device, self.dtype)
        else:
            reason = "the plan has no kernels for one row"
        if reason is None:
            layers = [
                LayerTensors(
                    layer.attention_norm, layer.mlp_norm, layer.qk_norms,
                    [(linear.weight, linear.scale, linear.bias) for linear in layer.matrices],
                    caches.keys[index, 0], caches.values[index, 0],
                )
                for index, layer in enumerate(self.layers)
            ]  # fmt: skip
            try:
                self._one = DecodeOne(
                    self.shape, layers, embedding=self.embedding, norm=self.norm, head=self.head.weight,
                    cos=self.cos, sin=self.sin, is_fp8=all(is_fp8),
                )  # fmt: skip
            except KernelError as error:
                reason = str(error)
        if reason is not None:
            log.info("batch 1 runs by several kernels: %s", reason)

    def prefill(self, prompts: Prompts, caches: Caches) -> torch.Tensor:
        """Several slots' chunks, packed: logits [len(last_rows), vocab_size] float32 of their last tokens."""
        shape = self.shape
        hidden = self._embed(prompts.ids, None)
        q = self._empty(len(hidden), shape.q_size, dtype=self.dtype)
        attended = torch.empty_like(q)
        parts: Parts | None = None
        bias: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            keys, values = caches.keys[index], caches.values[index]
            normed = self._norm(hidden, parts, bias, layer.attention_norm, layer.qkv.is_fp8)
            projected = self._multiply(normed, layer.qkv)
            self._rope(projected, layer, prompts.slots, prompts.positions, q, keys, values)
            self._prefill_attention(q, keys, values, prompts.tiles, attended)
            parts, bias = self._multiply(self._quantise(attended, layer.o), layer.o), layer.o.bias
            parts, bias = self._mlp(hidden, parts, bias, layer)
        return self._logits(hidden, parts, bias, prompts.last_rows)

    # ---- decode, one row

    def _decode_one(
        self, hidden: torch.Tensor, positions: torch.Tensor, caches: Caches, arrived: torch.Tensor
    ) -> torch.Tensor:
        shape = self.shape
        qkv = self._empty(1, 1, shape.linear_shape("qkv")[0])
        attended, product = self._empty(1, shape.q_size), self._empty(1, shape.intermediate_size)
        for index, layer in enumerate(self.layers):
            self._norm_gemv(hidden, layer.attention_norm, layer.qkv, qkv, self._mlp_amax)
            self._decode_attention(
                Parts(qkv), None, layer, positions, caches.keys[index], caches.values[index], arrived, attended
            )
            self._residual_gemv(attended, self._attention_amax, layer.o, hidden)
            self._norm_gemv_silu(hidden, layer.mlp_norm, layer.gate_up, product)
            self._residual_gemv(product, self._mlp_amax, layer.down, hidden)
        logits = self._empty(1, shape.vocab_size)
        self._norm_gemv(hidden, self.norm, self.head, logits, self._mlp_amax)
        return logits

    def _norm_gemv(
        self, hidden: torch.Tensor, norm: torch.Tensor, linear: Linear, out: torch.Tensor, zero: torch.Tensor
    ) -> None:
        n, k = linear.weight.shape
        tile = self.plan.gemv[linear.name]
        self.launch(
            gemv.norm_gemv, (triton.cdiv(n, tile.bn),),
            hidden, norm, linear.weight, self._or_nothing(linear.scale), self._or_nothing(linear.bias), out, zero,
            self.shape.rms_norm_eps, k,
            N=n, K=k, BN=tile.bn, BK=triton.next_power_of_2(k), FP8=linear.is_fp8,
            HAS_BIAS=linear.bias is not None, num_warps=tile.num_warps,
        )  # fmt: skip

    def _norm_gemv_silu(self, hidden: torch.Tensor, norm: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
        n, k = linear.weight.shape[0] // 2, linear.weight.shape[1]
        tile = self.plan.gemv[linear.name]
        self.launch(
            gemv.norm_gemv_silu, (self._programs(tile.programs, n, tile.bn),),
            hidden, norm, linear.weight, self._or_nothing(linear.scale), self._or_nothing(linear.bias), out,
            self._mlp_amax, self._attention_amax, self.shape.rms_norm_eps, k,
            N=n, K=k, BN=tile.bn, BK=triton.next_power_of_2(k), STAGES=tile.stages, FP8=linear.is_fp8,
            HAS_BIAS=linear.bias is not None, num_warps=tile.num_warps,
        )  # fmt: skip

    def _residual_gemv(self, x: torch.Tensor, amax: torch.Tensor, linear: Linear, hidden: torch.Tensor) -> None:
        n, k = linear.weight.shape
        tile = self.plan.gemv[linear.name]
        self.launch(
            gemv.residual_gemv, (triton.cdiv(n, tile.bn),),
            x, amax, linear.weight, self._or_nothing(linear.scale), self._or_nothing(linear.bias), hidden, k,
            N=n, K=k, BN=tile.bn, BK=min(tile.bk, triton.next_power_of_2(k)),
            FP8=linear.is_fp8, HAS_BIAS=linear.bias is not None, num_warps=tile.num_warps,
        )  # fmt: skip

    def _programs(self, per_processor: int, n: int, bn: int) -> int:
        tiles = int(triton.cdiv(n, bn))
        return min(tiles, per_processor * self._processors) if per_processor else tiles

    # ---- any number of rows

    def _decode_many(
        self, hidden: torch.Tensor, positions: torch.Tensor, caches: Caches, arrived: torch.Tensor
    ) -> torch.Tensor:
        attended = self._empty(len(hidden), self.shape.q_size)
        parts: Parts | None = None
        bias: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            normed = self._norm(hidden, parts, bias, layer.attention_norm, layer.qkv.is_fp8)
            qkv = self._multiply(normed, layer.qkv)
            self._decode_attention(
                qkv, layer.qkv.bias, layer, positions, caches.keys[index], caches.values[index], arrived, attended
            )
            parts, bias = self._multiply(self._quantise(attended, layer.o), layer.o), layer.o.bias
            parts, bias = self._mlp(hidden, parts, bias, layer)
        return self._logits(hidden, parts, bias, None)

    def _embed(self, ids: torch.Tensor, last_tokens: torch.Tensor | None) -> torch.Tensor:
        width = self.shape.hidden_size
        hidden = self._empty(len(ids), width)
        block = min(1024, triton.next_power_of_2(width))
        self.launch(
            rows.embed_rows, (len(ids), triton.cdiv(width, block)),
            ids, ids if last_tokens is None else last_tokens, self.embedding, hidden, self._attention_amax,
            H=width, BLOCK=block, HAS_LAST=last_tokens is not None, num_warps=4,
        )  # fmt: skip
        return hidden

    def _norm(
        self,
        hidden: torch.Tensor,
        parts: Parts | None,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
        is_fp8: bool,
        chosen: torch.Tensor | None = None,
    ) -> Rows:
        """RMS norm of the residual stream, or of its `chosen` rows, after what is still to be added to it."""
        width = hidden.shape[1]
        count = len(hidden) if chosen is None else len(chosen)
        out = self._empty(count, width, dtype=torch.float8_e4m3fn if is_fp8 else self.dtype)
        scale = self._empty(count) if is_fp8 else None
        block = triton.next_power_of_2(width)
        self.launch(
            rows.norm_rows, (count,),
            hidden, hidden if chosen is None else chosen, hidden if parts is None else parts.tensor,
            self._or_nothing(bias), weight, out, self._or_nothing(scale),
            0 if parts is None else parts.stride, self.shape.rms_norm_eps,
            H=width, BLOCK=block, NUM_PARTS=0 if parts is None else parts.count,
            HAS_BIAS=bias is not None, HAS_ROWS=chosen is not None, FP8=is_fp8, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
        return Rows(out, scale)

    def _quantise(self, x: torch.Tensor, linear: Linear) -> Rows:
        if not linear.is_fp8:
            return Rows(x.to(self.dtype), None)
        out, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), self._empty(len(x))
        block = triton.next_power_of_2(x.shape[1])
        self.launch(
            rows.quantise_rows, (len(x),), x, out, scale,
            K=x.shape[1], BLOCK=block, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
        return Rows(out, scale)

    def _mlp(
        self, hidden: torch.Tensor, parts: Parts, bias: torch.Tensor | None, layer: Layer
    ) -> tuple[Parts, torch.Tensor | None]:
        normed = self._norm(hidden, parts, bias, layer.mlp_norm, layer.gate_up.is_fp8)
        product = self._silu(self._multiply(normed, layer.gate_up), layer)
        return self._multiply(product, layer.down), layer.down.bias

    def _silu(self, parts: Parts, layer: Layer) -> Rows:
        count, width = parts.tensor.shape[1], self.shape.intermediate_size
        is_fp8, bias = layer.down.is_fp8, layer.gate_up.bias
        out = self._empty(count, width, dtype=torch.float8_e4m3fn if is_fp8 else self.dtype)
        scale = self._empty(count) if is_fp8 else None
        block = min(4096, triton.next_power_of_2(width))
        self.launch(
            rows.silu_rows, (count,),
            parts.tensor, self._or_nothing(bias), out, self._or_nothing(scale), parts.stride,
            I=width, BLOCK=block, NUM_PARTS=parts.count, HAS_BIAS=bias is not None, FP8=is_fp8,
            num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
        return Rows(out, scale)

    def _multiply(self, x: Rows, linear: Linear) -> Parts:
        """x @ weight.T, without the bias."""
        count, n, k = len(x.values), *linear.weight.shape
        if self.plan.use_library(count):
            return Parts(self._library_product(x, linear)[None])
        tile = self.plan.skinny[linear.name]
        bm = min(64, max(16, triton.next_power_of_2(count)))
        parts = self._empty(tile.num_parts, count, n)
        self.launch(
            skinny.skinny_gemm, (triton.cdiv(count, bm), triton.cdiv(n, tile.bn), tile.num_parts),
            x.values, self._or_nothing(x.scale), linear.weight, self._or_nothing(linear.scale), parts, count,
            N=n, K=k, BM=bm, BN=tile.bn, BK=tile.row_bytes // linear.weight.element_size(),
            NUM_PARTS=tile.num_parts, FP8=linear.is_fp8, PRECISION=self._precision, num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip
        return Parts(parts)

    def _library_product(self, x: Rows, linear: Linear) -> torch.Tensor:
        if linear.scale is None or x.scale is None:
            return x.values @ linear.weight.t()
        return torch._scaled_mm(
            x.values, linear.weight.t(), x.scale[:, None], linear.scale[None, :],
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip

    def _logits(
        self, hidden: torch.Tensor, parts: Parts | None, bias: torch.Tensor | None, chosen: torch.Tensor | None
    ) -> torch.Tensor:
        if chosen is not None and parts is not None:
            parts = Parts(parts.tensor[:, chosen])
        normed = self._norm(hidden, parts, bias, self.norm, False, chosen)
        if self.plan.use_library(len(normed.values)):
            return torch.mm(normed.values, self.head.weight.t(), out_dtype=torch.float32)
        return self._multiply(normed, self.head).tensor[0]

    # ---- attention

    def _decode_attention(
        self,
        qkv: Parts,
        bias: torch.Tensor | None,
        layer: Layer,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        arrived: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        shape, count = self.shape, len(positions)
        shared = shape.num_heads // shape.num_kv_heads
        group, half = max(16, triton.next_power_of_2(shared)), max(16, triton.next_power_of_2(shape.head_dim // 2))
        splits = self.plan.num_splits(count, shape.num_kv_heads, self._processors)
        partial = self._empty(count * shape.num_kv_heads * splits * group, shape.head_dim)
        partial_max, partial_sum = (self._empty(count * shape.num_kv_heads * splits * group) for _ in range(2))
        self.launch(
            attention.decode_attention, (splits, shape.num_kv_heads, count),
            qkv.tensor, self._or_nothing(bias), self._or_nothing(layer.qk_norms), self.cos, self.sin, positions,
            keys, values, partial, partial_max, partial_sum, arrived, out, self._attention_amax,
            qkv.stride, shape.max_seq_len, shape.head_dim**-0.5 * LOG2_E, shape.rms_norm_eps,
            HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, D=shape.head_dim, GROUP=group, BLOCK_HALF=half,
            BLOCK=DECODE_BLOCK, SPLITS=splits, NUM_PARTS=qkv.count, HAS_BIAS=bias is not None, QK_NORM=shape.qk_norm,
            HAS_AMAX=count == 1, EARLY=splits > 1, PRECISION=self._precision, num_warps=4,
        )  # fmt: skip

    def _rope(
        self,
        qkv: Parts,
        layer: Layer,
        slots: torch.Tensor,
        positions: torch.Tensor,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        shape = self.shape
        self.launch(
            rows.rope_rows, (len(slots),),
            qkv.tensor, self._or_nothing(layer.qkv.bias), self._or_nothing(layer.qk_norms), self.cos, self.sin,
            slots, positions, q, keys, values, qkv.stride, shape.max_seq_len, shape.rms_norm_eps,
            HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, D=shape.head_dim,
            BLOCK_HEADS=triton.next_power_of_2(shape.num_heads + 2 * shape.num_kv_heads),
            BLOCK_HALF=triton.next_power_of_2(shape.head_dim // 2), NUM_PARTS=qkv.count,
            HAS_BIAS=layer.qkv.bias is not None, QK_NORM=shape.qk_norm, num_warps=4,
        )  # fmt: skip

    def _prefill_attention(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor
    ) -> None:
        shape = self.shape
        self.launch(
            attention.prefill_attention, (shape.num_heads, len(tiles)),
            q, keys, values, tiles, out, shape.max_seq_len, shape.head_dim**-0.5 * LOG2_E,
            HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, D=shape.head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(shape.head_dim)), BM=PREFILL_TILE, BN=64,
            PRECISION=self._precision, num_warps=8, num_stages=3,
        )  # fmt: skip

    # ---- launching

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch `kernel` with the options that all have."""
        launcher: Callable[..., None] = kernel[grid]
        launcher(*arguments, PDL=self._pdl, **constants, **self._options)

    def _empty(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def _or_nothing(self, tensor: torch.Tensor | None) -> torch.Tensor:
        return self._nothing if tensor is None else tensor
