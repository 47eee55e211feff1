"""The router of a mixture of experts: which experts each token gets, and the tokens' order by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from deepseek_triton.ensemble.decoder.options import ExpertOptions
from deepseek_triton.ensemble.engine.runners.cuda.kernels import routing
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.linear import Rows
from deepseek_triton.ensemble.engine.runners.cuda.plan import KernelPlan
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightLoader

if TYPE_CHECKING:
    from deepseek_triton.ensemble.engine.runners.cuda.decode_gemv import DecodeGemv

BLOCK_EXPERTS, BLOCK_COLUMNS = 16, 128  # tile of the logits
MIN_PAIRS, MAX_PAIRS = 128, 4096  # read at once
COMPACT_PAIRS = 1024  # more may leave gaps between the tiles of different experts


@dataclass(frozen=True)
class RouterWeights:
    """weight: [num_experts, hidden_size] float32. bias: [num_experts] float32, added for the choice alone, or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def load(cls, loader: WeightLoader) -> RouterWeights:
        """Read one layer's."""
        return cls(loader.tensor("router.weight", torch.float32), loader.optional("router.bias"))


@dataclass(frozen=True)
class ExpertOrder:
    """Pairs of a token and one of its experts, sorted by expert and cut into tiles of at most `block` pairs.

    order: [pairs] int32. tiles: [most tiles, 3] int32: expert (−1: none), first place in `order`, number of pairs.
    """

    order: torch.Tensor
    tiles: torch.Tensor
    block: int


@dataclass(frozen=True)
class Routing:
    """Which experts a step's tokens get.

    chosen: [rows, experts of a token] int32, the best first, then those that every token gets; num_experts: none of
    this rank's. weights: the same shape, float32. num_experts: this rank's, with those that every token gets.
    """

    chosen: torch.Tensor
    weights: torch.Tensor
    num_experts: int
    order: ExpertOrder


@dataclass(frozen=True)
class RowRouting:
    """Which experts a single row gets: as in `Routing`, without the dimension of rows.

    amax: [experts of a token] float32 zeros, which the experts' first product raises to the largest magnitude of each
    one's row.
    """

    chosen: torch.Tensor
    weights: torch.Tensor
    amax: torch.Tensor


class Router:
    """Routes the tokens of a step.

    Args:
        positions: [rows] int64; negative: the row has no token. None: every row has one.
        own: the experts that this rank has, which count from 0 here. None: all.
    """

    def __init__(
        self,
        launch: Launcher,
        plan: KernelPlan,
        options: ExpertOptions,
        positions: torch.Tensor | None,
        own: range | None = None,
    ) -> None:
        self._launch, self._plan, self._options, self._positions = launch, plan, options, positions
        self._own = own or range(options.num_experts)

    def __call__(self, x: torch.Tensor, weights: RouterWeights, *, num_always: int = 0) -> Routing:
        """Route `x` [rows, hidden_size]; num_always: experts behind the router's that every token gets."""
        launch, count = self._launch, len(x)
        logits = self._logits(x, weights.weight)
        found = self._empty(count, num_always)
        launch(
            routing.choose_experts, (count,),
            logits, launch.or_nothing(weights.bias), launch.or_nothing(self._positions),
            found.chosen, found.weights, found.order.order, found.order.tiles, logits.stride(0), self._options.scale,
            self._own.start, NUM_PARTS=len(logits), ALONE=count == 1, **self._constants(num_always), num_warps=1,
        )  # fmt: skip
        if count > 1:
            self._sort(found.chosen, found.num_experts, found.order)
        return found

    def normed(
        self,
        hidden: torch.Tensor,
        norm: torch.Tensor,
        weights: RouterWeights,
        gemv: DecodeGemv,
        *,
        eps: float,
        is_fp8: bool,
        num_always: int,
    ) -> tuple[Rows, torch.Tensor, RowRouting]:
        """Norm the only row of `hidden` [1, hidden_size] and route it, in one kernel; attention_amax = 0.

        Returns:
            The norm, for FP8 in codes; in the network's dtype; and the routing.
        """
        launch, tile = self._launch, self._plan.gemv["router"]
        experts, k = weights.weight.shape
        plain, logits = launch.empty(1, k, dtype=launch.dtype), launch.empty(experts)
        count = self._options.num_experts_per_tok + num_always
        found = RowRouting(launch.empty(count, dtype=torch.int32), launch.empty(count), launch.empty(count))
        codes = launch.empty(1, k, dtype=torch.float8_e4m3fn) if is_fp8 else plain
        scale = launch.empty(1) if is_fp8 else None
        block = triton.next_power_of_2(k)
        launch(
            routing.norm_router, (triton.cdiv(experts, tile.bn),),
            hidden, norm, weights.weight, codes, launch.or_nothing(scale), plain, logits, gemv.finished,
            gemv.attention_amax, found.amax, launch.or_nothing(weights.bias), launch.or_nothing(self._positions),
            found.chosen, found.weights, eps, self._options.scale, self._own.start, k,
            K=k, BK=block, BE=tile.bn, FP8=is_fp8, **self._constants(num_always),
            num_warps=max(tile.num_warps, block // 1024),
        )  # fmt: skip
        return Rows(codes, scale), plain, found

    def _empty(self, count: int, num_always: int) -> Routing:
        """Uninitialised memory for the routing of so many rows."""
        top_k, own = self._options.num_experts_per_tok + num_always, len(self._own) + num_always
        chosen, weights = self._launch.empty(count, top_k, dtype=torch.int32), self._launch.empty(count, top_k)
        order = self._empty_order(chosen.numel(), own, self._expert_rows(chosen.numel(), num_always))
        return Routing(chosen, weights, own, order)

    def _constants(self, num_always: int) -> dict[str, Any]:
        """What the kernels that choose know when they are compiled."""
        options = self._options
        experts, top_k = options.num_experts, options.num_experts_per_tok
        groups = 1 if options.choice == "greedy" else options.num_groups
        return {
            "E": experts, "OWN": len(self._own), "TOP_K": top_k, "ALWAYS": num_always, "GROUPS": groups,
            "TOPK_GROUP": options.topk_group, "SIGMOID": options.scores == "sigmoid", "CHOICE": options.choice,
            "NORMALISED": options.is_normalised, "BLOCK_GROUPS": triton.next_power_of_2(groups),
            "BLOCK_SIZE": triton.next_power_of_2(experts // groups),
            "BLOCK_K": triton.next_power_of_2(top_k + num_always), "HAS_POSITIONS": self._positions is not None,
        }  # fmt: skip

    def order(self, chosen: torch.Tensor) -> ExpertOrder:
        """Sort the pairs of tokens and experts by expert, in tiles as long as an expert's share of them."""
        experts = len(self._own)
        order = self._empty_order(chosen.numel(), experts, self._expert_rows(chosen.numel(), 0))
        self._sort(chosen, experts, order)
        return order

    def _expert_rows(self, pairs: int, num_always: int) -> int:
        """Pairs of a tile: as many as an expert gets on average, of all ranks' experts."""
        return self._plan.expert_rows(pairs / (self._options.num_experts + num_always))

    def _empty_order(self, pairs: int, experts: int, block: int) -> ExpertOrder:
        # No more tiles than pairs, and than full tiles and one more of each expert.
        most = pairs // block + experts
        if pairs <= COMPACT_PAIRS:
            most = (pairs + min(pairs, experts) * (block - 1)) // block
        empty = self._launch.empty
        return ExpertOrder(empty(pairs, dtype=torch.int32), empty(most, 3, dtype=torch.int32), block)

    def _sort(self, chosen: torch.Tensor, experts: int, order: ExpertOrder) -> None:
        pairs = chosen.numel()
        self._launch(
            routing.order_by_expert, (experts,), chosen, order.order, order.tiles, pairs, len(order.tiles),
            E=experts, BM=order.block, COMPACT=pairs <= COMPACT_PAIRS, BINS=triton.next_power_of_2(experts + 1),
            BLOCK=min(MAX_PAIRS, max(MIN_PAIRS, triton.next_power_of_2(pairs))),
            num_warps=8 if pairs > COMPACT_PAIRS else 4,
        )  # fmt: skip

    def _logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[parts, rows, num_experts] float32."""
        launch, (count, width), experts = self._launch, x.shape, len(weight)
        blocks = triton.cdiv(experts, BLOCK_EXPERTS)
        # So many parts that few rows use every multiprocessor; the same for every number of rows.
        parts = max(1, min(PARTS // blocks, triton.cdiv(width, 2 * BLOCK_COLUMNS)))
        # More rows a program would use other instructions of the tensor cores, which sum in another order.
        rows, columns = (64, 64) if self._plan.use_library(count) else (16, BLOCK_COLUMNS)
        out = launch.empty(parts, count, experts)
        launch(
            routing.router_logits, (blocks, triton.cdiv(count, rows), parts), x, weight, out, count,
            E=experts, K=width, BM=rows, BE=BLOCK_EXPERTS, BK=columns, NUM_PARTS=parts,
            PRECISION="ieee" if launch.dtype == torch.float32 else "tf32x3", num_warps=4, num_stages=3,
        )  # fmt: skip
        return out


PARTS = 128  # programs of one row's logits, about one a multiprocessor
