"""Each kernel against float64 on fresh random inputs: on a GPU where there is one, else interpreted."""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.cuda_device import DEVICE, DTYPE, HAS_GPU  # isort: skip  # before triton

from benchmarks.cuda_reference import rms_norm, rotate, round_rows
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.base import DeviceSampling, PromptChunk
from deepseek_triton.ensemble.engine.runners.cuda.buffers import Prompts, StepResults
from deepseek_triton.ensemble.engine.runners.cuda.caches import PAGE, Caches
from deepseek_triton.ensemble.engine.runners.cuda.decoder import Decoder
from deepseek_triton.ensemble.engine.runners.cuda.kernels import sampling
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.linear import DeviceLinear, LinearOps, Parts, Rows
from deepseek_triton.ensemble.engine.runners.cuda.peer_buffers import PeerBuffers, RowPeerBuffers
from deepseek_triton.ensemble.engine.runners.cuda.plan import FAST, INVARIANT, Gemv
from deepseek_triton.ensemble.engine.runners.cuda.prompts import pack
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights

# The interpreter computes masked lanes too, and makes numbers of arrays.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]

SHAPE = DecoderShape(
    vocab_size=300, hidden_size=80, intermediate_size=112, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=24,
    rms_norm_eps=1e-5, max_seq_len=300, qk_norm=True,
)  # fmt: skip
IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability()[0] == 9
NEEDS_HOPPER = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")]
TOLERANCE = 2e-2 if torch.bfloat16 == DTYPE else 1e-5


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def decoder(*, is_fp8: bool = True, shape: DecoderShape = SHAPE) -> Decoder:
    source = RandomWeights(shape, is_fp8=is_fp8, has_qkv_bias=True)
    return Decoder(shape, source, FAST, DEVICE, dtype=DTYPE, pdl=HAS_GPU)


def linear(name: str, n: int, k: int, *, is_fp8: bool, has_bias: bool) -> DeviceLinear:
    weight, bias = random(n, k, seed=1), random(n, seed=2) if has_bias else None
    if not is_fp8:
        return DeviceLinear(name, weight.to(DTYPE), None, bias)
    return DeviceLinear(name, (weight * 100).to(torch.float8_e4m3fn), random(n, seed=3).abs() / 100, bias)


def matrix(linear: DeviceLinear) -> torch.Tensor:
    weight = linear.weight.double()
    return weight if linear.scale is None else weight * linear.scale.double()[:, None]


def rounded(x: torch.Tensor, linear: DeviceLinear) -> torch.Tensor:
    return round_rows(x.double()) if linear.is_fp8 else x.double()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.double() - wanted).norm() / wanted.norm())


FORMS = list(itertools.product([True, False], [True, False]))


@pytest.mark.parametrize(("is_fp8", "has_bias"), FORMS)
@pytest.mark.parametrize("k", [64, 80, 3584])
def test_a_normed_token_times_a_matrix(k: int, is_fp8: bool, has_bias: bool) -> None:
    d, weights = decoder(), linear("qkv", 50, k, is_fp8=is_fp8, has_bias=has_bias)
    hidden, norm = random(1, k), random(k, seed=5)
    out, zero = torch.full((1, 50), torch.nan, device=DEVICE), torch.ones(1, device=DEVICE)
    d.decode_gemv.norm_gemv(hidden, norm, weights, out, zero)
    wanted = rounded(rms_norm(hidden.double(), norm.double(), 1e-5), weights) @ matrix(weights).T
    wanted = wanted + (0 if weights.bias is None else weights.bias.double())
    assert error(out, wanted) < 3e-3  # one code of E4M3 may fall to the other side
    assert zero == 0


@pytest.mark.parametrize(("is_fp8", "has_bias"), FORMS)
@pytest.mark.parametrize("tile", [Gemv(bn=4, num_warps=4), Gemv(bn=4, num_warps=4, programs=1, stages=3)])
def test_a_normed_token_times_gate_and_up(tile: Gemv, is_fp8: bool, has_bias: bool) -> None:
    d, weights = decoder(), linear("gate_up", 2 * 112, 80, is_fp8=is_fp8, has_bias=has_bias)
    d.decode_gemv.plan, d.launch.processors = replace(FAST, gemv=FAST.gemv | {"gate_up": tile}), 4
    hidden, norm = random(1, 80), random(80, seed=5)
    out = torch.full((1, 112), torch.nan, device=DEVICE)
    d.decode_gemv.attention_amax.fill_(7.0)
    d.decode_gemv.norm_gemv_silu(hidden, norm, weights, out)
    both = rounded(rms_norm(hidden.double(), norm.double(), 1e-5), weights) @ matrix(weights).T
    gate, up = (both + (0 if weights.bias is None else weights.bias.double())).chunk(2, dim=-1)
    assert error(out, torch.nn.functional.silu(gate) * up) < 3e-3
    assert d.decode_gemv.mlp_amax == out.abs().max()
    assert d.decode_gemv.attention_amax == 0


@pytest.mark.parametrize(("is_fp8", "has_bias"), FORMS)
@pytest.mark.parametrize(("k", "bk"), [(64, 128), (200, 128), (3584, 4096)])  # read whole, in parts, and with a gap
def test_a_token_times_a_matrix_is_added_to_the_residual(k: int, bk: int, is_fp8: bool, has_bias: bool) -> None:
    d, weights = decoder(), linear("o", 50, k, is_fp8=is_fp8, has_bias=has_bias)
    d.decode_gemv.plan = replace(FAST, gemv=FAST.gemv | {"o": Gemv(bn=4, num_warps=4, bk=bk)})
    x, hidden = random(1, k), random(1, 50, seed=6)
    wanted = hidden.double() + rounded(x, weights) @ matrix(weights).T
    wanted = wanted + (0 if weights.bias is None else weights.bias.double())
    d.decode_gemv.residual_gemv(x, x.abs().max().reshape(1), weights, hidden)
    assert error(hidden, wanted) < 3e-3


@pytest.mark.parametrize("rows", [1, 3, 17, 70])
@pytest.mark.parametrize("is_fp8", [True, False])
@pytest.mark.parametrize("name", ["o", "down"])
def test_rows_times_a_matrix_in_parts(name: str, is_fp8: bool, rows: int) -> None:
    d, weights = decoder(), linear(name, 100, 560, is_fp8=is_fp8, has_bias=False)
    d.linear_ops.plan = INVARIANT
    x = random(rows, 560)
    values = Rows((x * 50).to(torch.float8_e4m3fn), random(rows, seed=7).abs()) if is_fp8 else Rows(x.to(DTYPE), None)
    found = d.linear_ops.multiply(values, weights).tensor
    exact = values.values.double() * (1 if values.scale is None else values.scale.double()[:, None])
    assert found.shape == (INVARIANT.small_m[name].num_parts, rows, 100)
    assert error(found.sum(0), exact @ matrix(weights).T) < 1e-3
    if rows > 1:  # one row's sums don't depend on its neighbours
        alone = d.linear_ops.multiply(
            Rows(values.values[:1], None if values.scale is None else values.scale[:1]), weights
        )
        assert torch.equal(alone.tensor[:, 0], found[:, 0])


@pytest.mark.parametrize("is_fp8", [True, False])
def test_the_residual_takes_in_the_parts_and_is_normed(is_fp8: bool) -> None:
    d = decoder()
    hidden, parts, bias, norm = random(5, 80), random(3, 5, 80, seed=1), random(80, seed=2), random(80, seed=3)
    wanted = hidden.double() + parts.double().sum(0) + bias.double()
    normed = d.linear_ops.norm(hidden, Parts(parts), bias, norm, is_fp8)
    assert error(hidden, wanted) < 1e-6
    exact = rms_norm(wanted, norm.double(), 1e-5)
    if normed.scale is None:
        assert error(normed.values, exact) < TOLERANCE
    else:
        assert error(normed.values.double() * normed.scale.double()[:, None], round_rows(exact)) < 3e-3


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 3])
def test_the_residual_takes_in_the_parts_of_all_ranks(size: int) -> None:
    """All on one GPU, each on its stream; again and again, with other numbers of rows."""
    width = 3584
    peer_buffers = [
        torch.zeros(RowPeerBuffers.num_bytes(size, width) // 8, dtype=torch.int64, device=DEVICE) for _ in range(size)
    ]
    addresses = torch.tensor([buffer.data_ptr() for buffer in peer_buffers], device=DEVICE)
    given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    streams: list[Any] = [torch.cuda.Stream() for _ in range(size)]  # type: ignore[no-untyped-call]
    ranks = [LinearOps(Launcher(DEVICE, DTYPE, pdl=False), FAST, 1e-5) for _ in range(size)]
    for rank, linear_ops in enumerate(ranks):
        linear_ops.row_peer_buffers = RowPeerBuffers.of(PeerBuffers(rank, size, addresses, given_up), 0)
    bias, norm = random(width, seed=2), random(width, seed=3)
    given_up[0] = 1  # a kernel may not be loaded while another waits for it
    for linear_ops in ranks:
        linear_ops.norm(random(1, width), Parts(random(2, 1, width), is_of_rank=True), bias, norm, True)
    torch.cuda.synchronize()
    given_up[0] = 0
    for linear_ops in ranks:
        linear_ops.row_peer_buffers.counts[:] = 2**31 - 3  # as after some thirty hours
    for step, count in enumerate((1, 64, 5, 64, 64, 2, 30)):
        hidden = [random(count, width, seed=step) for _ in range(size)]
        parts = [random(2, count, width, seed=10 * step + rank) for rank in range(size)]
        wanted = hidden[0].double() + sum(part.double().sum(0) for part in parts) + bias.double()
        torch.cuda.synchronize()
        found = []
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append(ranks[rank].norm(hidden[rank], Parts(parts[rank], is_of_rank=True), bias, norm, True))
        deadline = time.monotonic() + 10
        while not all(stream.query() for stream in streams):
            if time.monotonic() > deadline:
                given_up[0] = 1
                pytest.fail("the ranks wait for each other")
        for rank in range(size):
            assert error(hidden[rank], wanted) < 1e-6
            assert torch.equal(hidden[rank], hidden[0]), "the same bits everywhere"
            assert torch.equal(found[rank].values.view(torch.uint8), found[0].values.view(torch.uint8))


@pytest.mark.parametrize("is_fp8", [True, False])
def test_silu_of_the_parts(is_fp8: bool) -> None:
    d = decoder(is_fp8=is_fp8)
    parts = random(2, 5, 224)
    out = d.linear_ops.silu(Parts(parts), d.weights.layers[0].mlp.gate_up.bias, is_fp8)
    gate, up = parts.double().sum(0).chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    found = out.values.double() * (1 if out.scale is None else out.scale.double()[:, None])
    assert error(found, round_rows(exact) if is_fp8 else exact) < max(3e-3, TOLERANCE if not is_fp8 else 0)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [heads, d] over k, v [kv_heads, n, d], float64."""
    shared = len(q) // len(k)
    k, v = k.double().repeat_interleave(shared, 0), v.double().repeat_interleave(shared, 0)
    scores = torch.einsum("hd,hnd->hn", q.double(), k) * q.shape[-1] ** -0.5
    return torch.einsum("hn,hnd->hd", scores.softmax(-1), v)


def split_heads(row: torch.Tensor, d: Decoder, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A projection's row [width] → q, k rotated and normed, and v: [heads, d] each."""
    shape, layer = d.shape, d.weights.layers[0].attention
    q, k, v = torch.split(row.double().reshape(-1, shape.head_dim), [shape.num_heads, *[shape.num_kv_heads] * 2])
    if layer.qk_norms is not None:
        q, k = (rms_norm(x, layer.qk_norms[i].double(), shape.rms_norm_eps) for i, x in enumerate((q, k)))
    cos, sin = d.weights.cos[position][None].double(), d.weights.sin[position][None].double()
    return rotate(q[None], cos, sin)[0], rotate(k[None], cos, sin)[0], v


@dataclass(frozen=True)
class FilledCaches:
    """A cache of one layer in one of its forms, filled at random."""

    caches: Caches

    @classmethod
    def of(cls, form: str, shape: DecoderShape, slots: int) -> FilledCaches:
        if form == "slots":
            size = (1, slots, shape.num_kv_heads, shape.max_seq_len, shape.head_dim)
            return cls(Caches(random(*size, seed=8).to(DTYPE), random(*size, seed=9).to(DTYPE)))
        width = -(-shape.max_seq_len // PAGE)
        order = np.random.default_rng(0).permutation(slots * width) + 1  # block 0 is nobody's
        table = torch.tensor(order.reshape(slots, width), dtype=torch.int32, device=DEVICE)
        size = (1, slots * width + 1, shape.num_kv_heads, PAGE, shape.head_dim)
        keys, values = random(*size, seed=8), random(*size, seed=9)
        if form == "pages":
            return cls(Caches(keys.to(DTYPE), values.to(DTYPE), table))
        scales = [
            (torch.rand(size[:-1], generator=torch.Generator().manual_seed(seed)) / 40).to(DEVICE) for seed in (1, 2)
        ]
        key_codes, value_codes = ((x.clamp(-3, 3) * 42).to(torch.int8) for x in (keys, values))
        key_scales, value_scales = (scale.to(torch.bfloat16) for scale in scales)
        return cls(Caches(key_codes, value_codes, table, key_scales, value_scales))

    def copy(self) -> FilledCaches:
        """The same with tensors of its own."""
        cache = self.caches
        return FilledCaches(replace(cache, **{
            field.name: tensor.clone() for field in fields(cache) if (tensor := getattr(cache, field.name)) is not None
        }))  # fmt: skip

    def of_slot(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv_heads, positions, d] in float64."""
        cache = self.caches
        found = []
        for data, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
            exact = data[0].float().double()
            if scales is not None:
                exact = exact * scales[0].double()[..., None]
            if cache.table is None:
                found.append(exact[slot])
            else:
                found.append(exact[cache.table[slot].long()].movedim(0, 1).flatten(1, 2))
        return found[0], found[1]

    def stored(self, exact: torch.Tensor) -> torch.Tensor:
        """What the cache makes of heads [heads, d]."""
        if self.caches.key_scales is None:
            return exact
        least = (exact.abs().amax(-1, keepdim=True) / 127).float()
        scale = (((least.view(torch.int32) + 0xFFFF) >> 16) << 16).view(torch.float32).double()  # bfloat16, rounded up
        return (exact / scale + 0.5).floor() * scale


CACHES = ["slots", "pages", "pages-int8"]


def tolerance(form: str) -> float:
    """With codes, a value on the border between two of them may fall either way."""
    return TOLERANCE if form != "pages-int8" else max(TOLERANCE, 2e-2)


@pytest.mark.parametrize("form", CACHES)
@pytest.mark.parametrize("splits", [1, 4, None])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_decode_attention_at_every_kind_of_length(qk_norm: bool, splits: int | None, form: str) -> None:
    shape = replace(SHAPE, qk_norm=qk_norm)
    d = decoder(shape=shape)
    d.attention.plan = replace(FAST, splits=splits)
    positions = [0, 1, 63, 64, -1, 65, 127, 200, shape.max_seq_len - 1]
    filled = FilledCaches.of(form, shape, len(positions))
    finished_splits = torch.zeros(len(positions), 2, dtype=torch.int32, device=DEVICE)
    before = filled.copy()
    qkv, bias = random(2, len(positions), 10 * 24, seed=4), random(240, seed=3)
    out = torch.full((len(positions), shape.q_size), torch.nan, device=DEVICE)
    where = torch.tensor(positions, device=DEVICE)
    d.attention.decode(
        Parts(qkv), bias, d.weights.layers[0].attention.qk_norms,
        where, d.attention.share_out(where), filled.caches.layer(0), finished_splits, out, d.decode_gemv.attention_amax,
    )  # fmt: skip
    for slot, position in enumerate(positions):
        keys, values = before.of_slot(slot)
        found_keys, found_values = filled.of_slot(slot)
        if position < 0:
            assert torch.equal(found_keys, keys), "a row without a token writes nothing"
            continue
        q, k, v = split_heads(qkv.double().sum(0)[slot] + bias.double(), d, position)
        keys[:, position], values[:, position] = filled.stored(k), filled.stored(v)
        wanted = attention(q, keys[:, : position + 1], values[:, : position + 1])
        assert error(out[slot].view(shape.num_heads, -1), wanted) < tolerance(form), position
        assert error(found_keys, keys) < tolerance(form)
        assert error(found_values, values) < tolerance(form)
    assert not finished_splits.any()


@pytest.mark.parametrize("splits", [None, 1, 8])
@pytest.mark.parametrize(
    "positions",
    [
        [0],
        [5000],
        [-1, -1],
        [100] * 40,
        [-1, 31_000, 70, -1, 64, 900, 0],
        [*range(0, 300, 7)],
        [31_000] * 5 + [10] * 60,
    ],
)
def test_every_position_is_in_one_split_and_long_texts_have_many(positions: list[int], splits: int | None) -> None:
    d, processors = decoder(), 132
    d.attention.plan, d.launch.processors = replace(FAST, splits=splits), processors
    work = d.attention.share_out(torch.tensor(positions, device=DEVICE))
    rows, parts, spans = (tensor.tolist() for tensor in (work.rows, work.splits, work.spans))
    read = {row: 0 for row, position in enumerate(positions) if position >= 0}
    last = -1
    for row, part in zip(rows, parts, strict=True):
        if row < 0:
            assert last != -2, "unused items come last"
            continue
        assert row > last or (row == last and part * spans[row] == read[row]), "a row's stand in their order"
        last, read[row] = row, min((part + 1) * spans[row], positions[row] + 1)
        assert spans[row] % 64 == 0 and part < work.most
    assert read == {row: position + 1 for row, position in enumerate(positions) if position >= 0}
    total = sum(max(0, position + 1) for position in positions)
    if splits is None:
        even = total * SHAPE.num_kv_heads / (2 * processors)
        assert len(rows) * SHAPE.num_kv_heads <= 2 * processors + len(positions) * SHAPE.num_kv_heads
        assert len(set(spans)) == 1 and (spans[0] < max(even, max(positions) / 32) + 2 * 64 or len(positions) < 5)


@pytest.mark.parametrize(
    ("form", "head_dim", "is_hopper"),
    [
        *((form, 24, False) for form in CACHES),
        ("pages", 64, False),
        *(pytest.param("pages", size, True, marks=NEEDS_HOPPER) for size in (64, 128)),
    ],
)
def test_prefill_attention_over_several_slots_chunks(form: str, head_dim: int, is_hopper: bool) -> None:
    shape = replace(SHAPE, head_dim=head_dim)
    d, filled = decoder(shape=shape), FilledCaches.of(form, shape, 4)
    d.launch.is_hopper = is_hopper
    lengths = {2: (0, 130), 0: (70, 140), 3: (299, 1), 1: (5, 3)}  # slot → start and tokens
    before, cache = filled.copy(), filled.caches.layer(0)
    chunks = [PromptChunk(slot, np.zeros(count, np.int64), start) for slot, (start, count) in lengths.items()]
    prompts = Prompts.of(pack(chunks, tile=128, num_tokens=288, num_tiles=9), DEVICE)
    qkv = random(1, 288, (shape.num_heads + 2 * shape.num_kv_heads) * head_dim, seed=4)
    q = torch.zeros(288, shape.q_size, dtype=DTYPE, device=DEVICE)
    out = torch.full_like(q, torch.nan)
    layer = d.weights.layers[0].attention
    d.attention.rope(Parts(qkv), layer.qkv.bias, layer.qk_norms, prompts.slots, prompts.positions, q, cache)
    d.attention.prefill(q, cache, prompts.tiles, out)
    row, bias = 0, layer.qkv.bias
    assert bias is not None
    for slot, (start, count) in lengths.items():
        keys, values = before.of_slot(slot)
        heads = [split_heads(qkv[0, row + i].double() + bias.double(), d, start + i) for i in range(count)]
        for i, (_, k, v) in enumerate(heads):
            keys[:, start + i], values[:, start + i] = filled.stored(k), filled.stored(v)
        for i, (queries, _, _) in enumerate(heads):
            end = start + i + 1
            wanted = attention(queries, keys[:, :end], values[:, :end])
            assert error(out[row + i].view(shape.num_heads, -1), wanted) < tolerance(form), (slot, i)
        assert error(filled.of_slot(slot)[0], keys) < tolerance(form)
        assert error(filled.of_slot(slot)[1], values) < tolerance(form)
        row += count


def prefilled(
    d: Decoder, cache: Caches, cuts: Sequence[int], qkv: torch.Tensor, *, is_poisoned: bool = False
) -> torch.Tensor:
    """Attention of slot 1's prompt [cuts[-1], q_size], whose chunks end at `cuts`.

    is_poisoned: NaN lies behind each chunk.
    """
    layer, outputs, start = d.weights.layers[0].attention, [], 0
    for end in cuts:
        if is_poisoned:
            for data in cache.stored:
                if cache.table is None:
                    data[1, :, end:] = torch.nan
                else:
                    pages = cache.table[1].long()
                    data[pages[end // PAGE], :, end % PAGE :] = torch.nan
                    data[pages[end // PAGE + 1 :]] = torch.nan
        prompts = Prompts.of(pack([PromptChunk(1, np.zeros(end - start, np.int64), start)], tile=128), DEVICE)
        q = torch.zeros(end - start, d.shape.q_size, dtype=DTYPE, device=DEVICE)
        out = torch.full_like(q, torch.nan)
        parts = Parts(qkv[:, start:end].contiguous())
        d.attention.rope(parts, layer.qkv.bias, layer.qk_norms, prompts.slots, prompts.positions, q, cache)
        d.attention.prefill(q, cache, prompts.tiles, out)
        outputs.append(out)
        start = end
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("form", "head_dim", "is_hopper"),
    [
        ("slots", 24, False),
        ("pages", 24, False),
        *(pytest.param("pages", size, True, marks=NEEDS_HOPPER) for size in (64, 128)),
    ],
)
def test_prefill_gives_the_same_bits_however_it_is_cut_and_whatever_lies_behind(
    form: str, head_dim: int, is_hopper: bool
) -> None:
    shape = replace(SHAPE, head_dim=head_dim)
    d = decoder(shape=shape)
    d.launch.is_hopper = is_hopper
    qkv = random(1, 290, (shape.num_heads + 2 * shape.num_kv_heads) * head_dim, seed=4)
    whole = prefilled(d, FilledCaches.of(form, shape, 4).caches.layer(0), [290], qkv)
    assert whole.isfinite().all()
    for cuts in ([1, 64, 200, 290], [127, 129, 290]):
        cache = FilledCaches.of(form, shape, 4).caches.layer(0)
        assert torch.equal(prefilled(d, cache, cuts, qkv, is_poisoned=True), whole), cuts


def test_pages_give_the_bits_that_slots_give() -> None:
    d, slots = decoder(), FilledCaches.of("slots", SHAPE, 3)
    pages = FilledCaches.of("pages", SHAPE, 3)
    assert pages.caches.table is not None
    for slot, table in enumerate(pages.caches.table.tolist()):
        for data, source in ((pages.caches.keys, slots.caches.keys), (pages.caches.values, slots.caches.values)):
            for index, block in enumerate(table):
                part = source[0, slot, :, index * PAGE : (index + 1) * PAGE]
                data[0, block, :, : part.shape[1]] = part
    positions = torch.tensor([5, 64, 290], device=DEVICE)
    qkv, norms, found = random(2, 3, 240, seed=4), d.weights.layers[0].attention.qk_norms, []
    for splits in (1, 4):
        d.attention.plan = replace(FAST, splits=splits)
        for filled in (slots, pages):
            out = torch.full((3, SHAPE.q_size), torch.nan, device=DEVICE)
            finished = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
            amax = d.decode_gemv.attention_amax
            work, cache = d.attention.share_out(positions), filled.caches.layer(0)
            d.attention.decode(Parts(qkv), None, norms, positions, work, cache, finished, out, amax)
            found.append(out)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])


# ---- sampling


def sample(
    d: Decoder, logits: torch.Tensor, samplings: list[DeviceSampling]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    m, v = logits.shape
    chunks = -(-v // 256)
    maxima, sums = (torch.empty(m, chunks, device=DEVICE) for _ in range(2))
    best = torch.empty(m, chunks, dtype=torch.int32, device=DEVICE)
    d.launch(sampling.scan_logits, (chunks, m), logits, maxima, best, sums, V=v, CHUNK=256, CHUNKS=chunks)
    columns = [
        torch.tensor([getattr(one, name) for one in samplings], dtype=dtype, device=DEVICE)
        for name, dtype in (
            ("temperature", torch.float32), ("top_k", torch.int32), ("top_p", torch.float32), ("min_p", torch.float32),
            ("seed", torch.int64), ("step", torch.int64),
        )
    ]  # fmt: skip
    tokens = torch.full((m,), -1, dtype=torch.int64, device=DEVICE)
    results = StepResults(m, is_pinned=DEVICE.type == "cuda")
    places = torch.arange(
        2 * m - 1, m - 1, -1, dtype=torch.int32, device=DEVICE
    )  # the second step's, from the last one on
    d.launch(
        sampling.sample_tokens, (m,), logits, maxima, best, sums, *columns, tokens, places, results.tokens,
        results.log_probs, V=v, CHUNKS=chunks, BLOCK_CHUNKS=4, BLOCK=256,
    )  # fmt: skip
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(results.tokens[1].flip(0), tokens.cpu())
    return tokens.cpu().numpy(), results.log_probs[1].flip(0).numpy()


def kept_tokens(logits: torch.Tensor, one: DeviceSampling) -> set[int]:
    """What top-k, then top-p, then min-p leave."""
    p = (logits.double() / one.temperature).softmax(-1)
    order = torch.argsort(p, descending=True)
    order = order[: one.top_k or len(order)]
    mass = p[order].cumsum(0) / p[order].sum()
    order = order[: int((mass < one.top_p - 1e-7).sum()) + 1]
    return {int(token) for token in order if p[token] >= one.min_p * p.max()}


@pytest.mark.parametrize(
    "one",
    [
        DeviceSampling(1.0, 0, 1.0, 0.0, 0, 0),
        DeviceSampling(0.7, 5, 1.0, 0.0, 0, 0),
        DeviceSampling(1.3, 0, 0.6, 0.0, 0, 0),
        DeviceSampling(0.9, 0, 1.0, 0.2, 0, 0),
        DeviceSampling(1.1, 20, 0.8, 0.05, 0, 0),
    ],
)
def test_tokens_are_sampled_from_what_is_kept_and_by_their_probabilities(one: DeviceSampling) -> None:
    d, logits = decoder(), random(1, 300, seed=11) * 2
    n = 2000 if HAS_GPU else 60
    tokens, log_probs = sample(d, logits.expand(n, -1).contiguous(), [replace(one, seed=s) for s in range(n)])
    kept = sorted(kept_tokens(logits[0].cpu(), one))
    assert set(tokens.tolist()) <= set(kept)
    p = (logits[0].cpu().double() / one.temperature).softmax(-1)[kept].numpy()
    expected_counts, counts = n * p / p.sum(), np.array([(tokens == token).sum() for token in kept])
    often = expected_counts >= 5  # the others count as one
    expected_counts = np.append(expected_counts[often], expected_counts[~often].sum() + 1e-9)
    counts = np.append(counts[often], counts[~often].sum())
    chi_squared, freedom = float((np.square(counts - expected_counts) / expected_counts).sum()), len(counts) - 1
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom) + 5
    expected = logits[0].cpu().double().log_softmax(-1)[tokens]
    np.testing.assert_allclose(log_probs, expected, atol=1e-4)


def test_a_sampled_token_depends_on_seed_and_step_and_on_no_other_row() -> None:
    d, logits = decoder(), random(6, 300, seed=12)
    samplings = [
        DeviceSampling(1.0, 0, 1.0, 0.0, seed, step)
        for seed, step in ((1, 0), (1, 1), (2, 0), (-5, 3), (2**40, 2**33), (1, 0))
    ]
    tokens, log_probs = sample(d, logits, samplings)
    for row, one in enumerate(samplings):
        alone, alone_probs = sample(d, logits[row : row + 1].contiguous(), [one])
        assert (alone[0], alone_probs[0]) == (tokens[row], log_probs[row])
    same = logits[:1].expand(64, -1).contiguous()
    steps, _ = sample(d, same, [DeviceSampling(1.0, 0, 1.0, 0.0, 7, step) for step in range(64)])
    assert len(set(steps.tolist())) > 10


def test_greedy_rows_take_the_first_of_the_likeliest() -> None:
    d, logits = decoder(), random(3, 300, seed=13)
    logits[0, [17, 290]] = 9.0
    tokens, log_probs = sample(
        d,
        logits,
        [
            DeviceSampling(0.0, 0, 1.0, 0.0, 0, 0),
            DeviceSampling(0.0, 5, 0.5, 0.0, 0, 0),
            DeviceSampling(2.0, 1, 1.0, 0.0, 0, 0),
        ],
    )
    assert tokens.tolist() == [17, *logits[1:].argmax(-1).tolist()]
    wanted = logits.double().log_softmax(-1).cpu()[range(3), tokens]
    np.testing.assert_allclose(log_probs, wanted, atol=1e-4)


def test_logits_that_are_not_numbers_make_the_log_probability_nan() -> None:
    logits = random(1, 300)
    logits[0, 5] = torch.nan
    _, log_probs = sample(decoder(), logits, [DeviceSampling(0.0, 0, 1.0, 0.0, 0, 0)])
    assert not np.isfinite(log_probs[0])
