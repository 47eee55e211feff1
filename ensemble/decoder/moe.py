"""A mixture of experts: a router chooses a few gated MLPs for each token; shared experts compute every token.

Source: DeepSeekMoE, arXiv 2401.06066; the sigmoid router with a bias for the choice: DeepSeek-V3, arXiv 2412.19437.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from deepseek_triton.ensemble.decoder.dense_mlp import ALIGNMENT, mlp_shard
from deepseek_triton.ensemble.decoder.options import ExpertOptions, ExpertShare
from deepseek_triton.ensemble.decoder.part import (
    CacheTensor,
    Linear,
    Norm,
    Plain,
    Shard,
    SharedChannels,
    Split,
    Tap,
    part_of,
)

NORM = "post_attention_layernorm"
ROUTER, BIAS = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"
MATRICES = ("gate_proj", "up_proj", "down_proj")
SHARED_GATE, SHARED_UP, SHARED_DOWN = (f"mlp.shared_experts.{name}" for name in MATRICES)
SHARED_PRODUCT = "mlp.shared_experts.product"
CHOSEN = "mlp.experts.chosen"  # the experts of each token


def expert_modules(expert: int) -> tuple[str, str, str]:
    """The names of an expert's gate, up and down."""
    gate, up, down = (f"mlp.experts.{expert}.{name}" for name in MATRICES)
    return gate, up, down


@dataclass(frozen=True)
class MixtureOfExperts:
    """Every expert is a gated MLP without biases; the shared experts are one, so many times as wide.

    expert_share: what a rank has of them; None: all.
    """

    hidden_size: int
    options: ExpertOptions
    expert_share: ExpertShare | None = None

    NOUN: ClassVar[str] = "mixture of experts"
    LINEARS: ClassVar[tuple[str, ...]] = (
        *(f"mlp.experts.*.{name}" for name in MATRICES),
        SHARED_GATE,
        SHARED_UP,
        SHARED_DOWN,
    )

    @property
    def own(self) -> ExpertShare:
        """What it has of the experts."""
        options = self.options
        shared_size = options.num_shared_experts * options.intermediate_size
        return self.expert_share or ExpertShare(0, options.num_experts, options.intermediate_size, shared_size)

    @property
    def shared_size(self) -> int:
        """Width of the shared experts; 0: there are none."""
        return self.own.shared_size

    @property
    def experts(self) -> range:
        """The numbers of its routed experts."""
        return range(self.own.first, self.own.first + self.own.num_experts)

    @property
    def modules(self) -> tuple[Norm | Linear | Plain, ...]:
        """See `Part`."""
        options, hidden, inner, shared = (
            self.options,
            self.hidden_size,
            self.own.intermediate_size,
            self.shared_size,
        )
        router = [Plain(ROUTER, "ffn_gate_inp.weight", "router.weight", (options.num_experts, hidden))]
        if options.choice == "group_top2":
            router.append(Plain(BIAS, "exp_probs_b.bias", "router.bias", (options.num_experts,)))
        experts = [expert_modules(expert) for expert in self.experts]
        inputs = [Linear(name, "", inner, hidden) for gate, up, _ in experts for name in (gate, up)]
        outputs = [Linear(down, "", hidden, inner) for _, _, down in experts]
        always = (
            Linear(SHARED_GATE, "ffn_gate_shexp", shared, hidden),
            Linear(SHARED_UP, "ffn_up_shexp", shared, hidden),
            Linear(SHARED_DOWN, "ffn_down_shexp", hidden, shared),
        )
        return (Norm(NORM, "ffn_norm", "mlp_norm", hidden), *router, *inputs, *outputs, *(always if shared else ()))

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The shared experts'. The router reads their input too, so smoothing must not divide it."""
        if not self.shared_size:
            return ()
        return Tap(NORM, (SHARED_GATE, SHARED_UP)), Tap(SHARED_PRODUCT, (SHARED_DOWN,), producer=SHARED_UP)

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """The shared experts' gate and up; and down."""
        if not self.shared_size:
            return {}
        return {"shared_gate_up": (SHARED_GATE, SHARED_UP), "shared_down": (SHARED_DOWN,)}

    @property
    def stacked(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Each expert's gate and up; and each one's down."""
        experts = [expert_modules(expert) for expert in self.experts]
        return {
            "experts_gate_up": tuple((gate, up) for gate, up, _ in experts),
            "experts_down": tuple((down,) for _, _, down in experts),
        }

    @property
    def cache(self) -> tuple[CacheTensor, ...]:
        """Nothing."""
        return ()

    def shared_channels(self, tap: str) -> SharedChannels | None:
        """None: every channel is its own."""
        return None

    def reason_against(self, split: Split) -> str | None:
        """See `Part`."""
        own, options = self.own, self.options
        if options.num_experts % split.expert_size:
            return f"{options.num_experts} experts can't be shared out evenly"
        if options.intermediate_size % (size := split.size // split.expert_size):
            return f"the experts' intermediate_size {options.intermediate_size} can't be shared out evenly"
        if own.shared_size % split.size:
            return f"the shared experts' width {own.shared_size} can't be shared out evenly"
        shared = own.shared_size // split.size
        # Where it is so many times as wide as a rank's experts, it is computed as so many of them.
        if shared % (options.intermediate_size // size) and shared % ALIGNMENT:
            return f"each rank's part of the shared experts is {shared} wide, must be a multiple of {ALIGNMENT}"
        return None

    def sharded(self, split: Split, rank: int) -> MixtureOfExperts:
        """Whole experts for each group of ranks, of which a rank has columns of the intermediate state."""
        size = split.size // split.expert_size
        experts = part_of(0, rank // size, self.options.num_experts // split.expert_size)
        share = ExpertShare(
            experts.start, experts.stop - experts.start,
            self.options.intermediate_size // size, self.shared_size // split.size,
        )  # fmt: skip
        return replace(self, expert_share=share)

    def shard(self, matrix: str, kind: str, rank: int, split: Split) -> Shard:
        """A rank's experts, and as of a dense MLP its share of each; of the shared experts one of `size` shares."""
        if matrix in self.fused:
            return mlp_shard(matrix, kind, self.shared_size, rank, split.size)
        size = split.size // split.expert_size
        share = mlp_shard(matrix, kind, self.options.intermediate_size, rank % size, size)
        return replace(share, matrices=part_of(0, rank // size, self.options.num_experts // split.expert_size))
