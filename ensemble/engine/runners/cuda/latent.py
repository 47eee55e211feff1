"""Latent attention over the slots' caches: the kernels that prefill and decode launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from deepseek_triton.ensemble.decoder.mla import INNER_NORM_EPS, LatentAttention
from deepseek_triton.ensemble.engine.runners.cuda.attention import LOG2_E, PREFILL_TILE
from deepseek_triton.ensemble.engine.runners.cuda.caches import Caches
from deepseek_triton.ensemble.engine.runners.cuda.kernels import mla
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.linear import MAX_PREFETCHING_ROWS, Parts, Rows
from deepseek_triton.ensemble.engine.runners.cuda.plan import KernelPlan

ABSORBED_COLUMNS = 64  # of the latent, that one program makes of a query
VALUE_ROWS = 64  # rows and splits of a program of latent_values, at most
PREFILL_ROWS = 64  # queries of a program: with a latent of 512 each, more have no room in registers


@dataclass(frozen=True)
class LatentTile:
    """How decoding reads the entries: heads of a program, at most, and positions at a time."""

    heads: int
    block: int = 32
    num_warps: int = 4
    num_stages: int = 5

    def fitting(self, entry_bytes: int, shared_bytes: int) -> LatentTile:
        """The same, reading no further ahead than shared memory has room.

        entry_bytes: of an entry, and of a head's query; with blocks and their tables Triton reads nothing ahead.
        """
        queries = self.heads * (entry_bytes + 2 * self.block)
        ahead = (shared_bytes - queries) // (self.block * entry_bytes)
        return replace(self, num_stages=max(1, min(self.num_stages, 1 + ahead)))


# Measured on an H200 with 16 heads: at 32 rows and more the short block is faster, with two programs on each
# multiprocessor.
FEW_ROWS, MANY_ROWS, MANY_HEADS = LatentTile(16, block=64), LatentTile(16), LatentTile(32, num_warps=8)
MAX_FEW_ROWS = 16
LINE_BYTES = 128


@dataclass(frozen=True)
class Projected:
    """What the projections of rows give.

    query: [n, rows, …], the heads in its first columns. compressed: [n, rows, …], the latent and the rotary key from
    `column` on. Biases are those of all columns.
    """

    query: Parts
    query_bias: torch.Tensor | None
    compressed: Parts
    compressed_bias: torch.Tensor | None
    column: int


class LatentKernels:
    """The entries' update, and attention over them; cos and sin: [max_seq_len, qk_rope_head_dim / 2]."""

    def __init__(
        self,
        launch: Launcher,
        plan: KernelPlan,
        part: LatentAttention,
        cos: torch.Tensor,
        sin: torch.Tensor,
        tile: LatentTile | None = None,
    ) -> None:
        self.launch, self.part, self.tile = launch, part, tile
        self._plan, self._cos, self._sin = plan, cos, sin
        options = part.options
        self._rank, self._rope = options.kv_lora_rank, options.qk_rope_head_dim
        self._blocks = {name: max(16, triton.next_power_of_2(size)) for name, size in self._ranges().items()}
        self._scale = part.softmax_scale * LOG2_E
        self._one_split: tuple[torch.Tensor, torch.Tensor] | None = None

    def _ranges(self) -> dict[str, int]:
        options = self.part.options
        return {
            "rank": options.kv_lora_rank, "rope": options.qk_rope_head_dim, "nope": options.qk_nope_head_dim,
            "value": options.v_head_dim,
        }  # fmt: skip

    def norm_query(self, compressed: Parts, bias: torch.Tensor | None, norm: torch.Tensor, is_fp8: bool) -> Rows:
        """The norm of the query's latent, the first columns of `compressed`."""
        launch, (count, row), width = self.launch, compressed.tensor.shape[1:], len(norm)
        out = launch.empty(count, width, dtype=torch.float8_e4m3fn if is_fp8 else launch.dtype)
        scale = launch.empty(count) if is_fp8 else None
        block = triton.next_power_of_2(width)
        launch(
            mla.norm_columns, (count,),
            compressed.tensor, launch.or_nothing(bias), norm, out, launch.or_nothing(scale),
            compressed.stride, INNER_NORM_EPS,
            K=width, ROW=row, BLOCK=block, NUM_PARTS=compressed.count, HAS_BIAS=bias is not None, FP8=is_fp8,
            num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
        return Rows(out, scale)

    def rows(
        self,
        projected: Projected,
        kv_norm: torch.Tensor,
        kv_b: torch.Tensor,
        slots: torch.Tensor | None,
        positions: torch.Tensor,
        cache: Caches,
        *,
        absorb: bool = True,
        packed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows' entries to the cache.

        Args:
            kv_b: [num_heads, qk_nope_head_dim + v_head_dim, kv_lora_rank].
            slots: of each row; None: row i is slot i.
            packed: [rows, entry_size], gets the entries too.

        Returns:
            Queries [rows, num_heads, entry_size], rotated, and absorbed unless the second result is to be multiplied
            with kv_b: their plain channels [rows, num_heads, qk_nope_head_dim].
        """
        launch, options, heads = self.launch, self.part.options, self.part.num_heads
        query, compressed = projected.query, projected.compressed
        count, q_row = query.tensor.shape[1:]
        queries = launch.empty(count, heads, self.part.entry_size, dtype=launch.dtype)
        plain = queries if absorb else launch.empty(count, heads, options.qk_nope_head_dim, dtype=launch.dtype)
        bm = min(64, max(16, triton.next_power_of_2(count)))
        columns = min(ABSORBED_COLUMNS, self._blocks["rank"])
        tiles = triton.cdiv(self._rank, columns) if absorb else 1
        launch(
            mla.latent_rows, (triton.cdiv(count, bm), heads * tiles + bm // mla.ENTRY_ROWS.value),
            query.tensor, launch.or_nothing(projected.query_bias), compressed.tensor,
            launch.or_nothing(projected.compressed_bias), kv_norm, kv_b, self._cos, self._sin,
            positions if slots is None else slots, positions, launch.or_nothing(cache.table), cache.keys,
            queries, plain, launch.or_nothing(packed), query.stride, compressed.stride,
            cache.extent, INNER_NORM_EPS, count,
            HEADS=heads, NOPE=options.qk_nope_head_dim, ROPE=self._rope, VALUE=options.v_head_dim, RANK=self._rank,
            BLOCK_NOPE=self._blocks["nope"], BLOCK_HALF=triton.next_power_of_2(self._rope // 2),
            BLOCK_RANK=self._blocks["rank"], COLUMNS=columns,
            Q_ROW=q_row, KV_ROW=compressed.tensor.shape[2], KV_COLUMN=projected.column,
            Q_PARTS=query.count, KV_PARTS=compressed.count, HAS_Q_BIAS=projected.query_bias is not None,
            HAS_KV_BIAS=projected.compressed_bias is not None, BM=bm, PAGE=cache.page, ABSORB=absorb,
            IS_DECODE=slots is None, PACK=packed is not None, PRECISION=launch.precision, num_warps=4,
        )  # fmt: skip
        return queries, plain

    def decode(
        self,
        queries: torch.Tensor,
        kv_b: torch.Tensor,
        positions: torch.Tensor,
        cache: Caches,
        out: torch.Tensor,
        amax: torch.Tensor | None = None,
    ) -> None:
        """Attend with one token of each slot, into `out` [rows, num_heads * v_head_dim]; amax [1]: max |out|."""
        launch, heads, count = self.launch, self.part.num_heads, len(positions)
        tile = self.tile or self._tile(count)
        if not cache.page:
            columns = self._blocks["rank"] + self._blocks["rope"]
            tile = tile.fitting(columns * launch.dtype.itemsize, launch.shared_bytes)
        group = min(tile.heads, max(16, triton.next_power_of_2(heads)))
        groups = triton.cdiv(heads, group)
        # Few rows have half as many programs as in other attention: with more, each would read less than one block.
        splits = self._plan.num_splits(count * (2 if count <= MAX_FEW_ROWS else 1), groups, launch.processors)
        partial = launch.empty(count, splits, heads, self._rank)
        partial_max, partial_sum = (launch.empty(count, splits, heads) for _ in range(2))
        launch(
            mla.decode_latents, (splits, groups, count),
            queries, cache.keys, launch.or_nothing(cache.table), positions, partial, partial_max, partial_sum,
            cache.extent, self._scale,
            HEADS=heads, RANK=self._rank, ROPE=self._rope, GROUP=group, BLOCK_RANK=self._blocks["rank"],
            BLOCK_ROPE=self._blocks["rope"], BLOCK=tile.block, SPLITS=splits, PAGE=cache.page,
            BLOCK_LINES=triton.next_power_of_2(triton.cdiv(self.part.entry_size, self._line)),
            **self._prefetching(count), PRECISION=launch.precision,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        self._values(partial, partial_max, partial_sum, kv_b, out, amax)

    def _tile(self, rows: int) -> LatentTile:
        if self.part.num_heads > MANY_ROWS.heads:
            return MANY_HEADS
        # In one order for every batch size where the plan has one number of splits.
        return FEW_ROWS if rows <= MAX_FEW_ROWS or self._plan.splits is not None else MANY_ROWS

    @property
    def _line(self) -> int:
        return LINE_BYTES // self.launch.dtype.itemsize

    def _prefetching(self, rows: int) -> dict[str, int | bool]:
        """The kernels' constants: few rows leave time to fetch before waiting."""
        is_even = self._blocks["rank"] >= self._line
        return {"PREFETCH": self.launch.prefetches and rows <= MAX_PREFETCHING_ROWS and is_even, "LINE": self._line}

    def _values(
        self,
        partial: torch.Tensor,
        partial_max: torch.Tensor,
        partial_sum: torch.Tensor,
        kv_b: torch.Tensor,
        out: torch.Tensor,
        amax: torch.Tensor | None = None,
    ) -> None:
        """Merge what the splits attended to, [rows, splits, num_heads, kv_lora_rank], into values `out`."""
        (count, splits, heads), options = partial_max.shape, self.part.options
        rows = VALUE_ROWS // splits
        block = min(32 if count <= 4 else 64, max(16, triton.next_power_of_2(options.v_head_dim)))
        self.launch(
            mla.latent_values, (triton.cdiv(count, rows), heads, triton.cdiv(options.v_head_dim, block)),
            partial, partial_max, partial_sum, kv_b, out, self.launch.or_nothing(amax), count,
            HEADS=heads, NOPE=options.qk_nope_head_dim, VALUE=options.v_head_dim, RANK=self._rank, SPLITS=splits,
            BLOCK_VALUE=block, BLOCK_RANK=min(128, self._blocks["rank"]), ROWS=rows, HAS_AMAX=amax is not None,
            **self._prefetching(count), PRECISION=self.launch.precision,
            num_warps=4,
        )  # fmt: skip

    def prefill(self, queries: torch.Tensor, cache: Caches, tiles: torch.Tensor, attended: torch.Tensor) -> None:
        """Attend with packed prompts' absorbed queries, into `attended` [rows, num_heads, kv_lora_rank].

        tiles: of `PackedPrompts`.
        """
        shares = PREFILL_TILE // PREFILL_ROWS
        self.launch(
            mla.prefill_latents, (self.part.num_heads * shares, len(tiles)),
            queries, cache.keys, self.launch.or_nothing(cache.table), tiles, attended, cache.extent, self._scale,
            HEADS=self.part.num_heads, RANK=self._rank, ROPE=self._rope, BLOCK_RANK=self._blocks["rank"],
            BLOCK_ROPE=self._blocks["rope"], BM=PREFILL_ROWS, BN=64, SHARES=shares, PAGE=cache.page,
            PRECISION=self.launch.precision, num_warps=8, num_stages=2,
        )  # fmt: skip

    def prefill_whole(
        self,
        queries: torch.Tensor,
        plain: torch.Tensor,
        packed: torch.Tensor,
        kv_b: torch.Tensor,
        tiles: torch.Tensor,
    ) -> torch.Tensor:
        """The values [rows, num_heads * v_head_dim] of prompts from their first token on, by each head's own keys.

        queries, plain, packed: what `rows` gave without absorbing.
        """
        options, heads, (count, _) = self.part.options, self.part.num_heads, packed.shape
        made = packed[:, : self._rank] @ kv_b.view(-1, self._rank).t()
        out = self.launch.empty(count, heads * options.v_head_dim, dtype=self.launch.dtype)
        self.launch(
            mla.prefill_heads, (heads, len(tiles)),
            queries, plain, made, packed, tiles, out, self._scale,
            HEADS=heads, NOPE=options.qk_nope_head_dim, ROPE=self._rope, VALUE=options.v_head_dim, RANK=self._rank,
            BLOCK_NOPE=self._blocks["nope"], BLOCK_ROPE=self._blocks["rope"], BLOCK_VALUE=self._blocks["value"],
            BM=PREFILL_TILE, BN=64, PRECISION=self.launch.precision, num_warps=8, num_stages=3,
        )  # fmt: skip
        return out

    def absorb(self, queries: torch.Tensor, plain: torch.Tensor, kv_b: torch.Tensor) -> None:
        """Fill in the latent columns of `queries`, by cuBLAS; arguments: what `rows` gave without absorbing."""
        by_head = queries[:, :, : self._rank].transpose(0, 1)
        torch.bmm(plain.transpose(0, 1), kv_b[:, : plain.shape[2]], out=by_head)

    def values(self, attended: torch.Tensor, kv_b: torch.Tensor, *, use_library: bool) -> torch.Tensor:
        """The values [rows, num_heads * v_head_dim] of what rows attended to [rows, num_heads, kv_lora_rank]."""
        options, (count, heads, _) = self.part.options, attended.shape
        out = self.launch.empty(count, heads, options.v_head_dim, dtype=self.launch.dtype)
        if use_library:
            to_values = kv_b[:, options.qk_nope_head_dim :].transpose(1, 2)
            torch.bmm(attended.transpose(0, 1), to_values, out=out.transpose(0, 1))
        else:  # one split, whose weight is 1
            if self._one_split is None:
                maxima = torch.zeros(count, 1, heads, device=attended.device)
                self._one_split = maxima, torch.ones_like(maxima)
            self._values(attended, *self._one_split, kv_b, out)
        return out.view(count, -1)
