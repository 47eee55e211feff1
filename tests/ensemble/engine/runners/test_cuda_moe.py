"""The mixture of experts' kernels against float64: on a GPU where there is one, else interpreted."""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.support.cuda_device import DEVICE, DTYPE, HAS_GPU  # isort: skip  # before triton

from benchmarks.cuda_reference import rms_norm, round_rows
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.options import ExpertOptions
from deepseek_triton.ensemble.engine.runners.cuda.decode_gemv import DecodeGemv
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.linear import DeviceLinear, LinearOps, Parts, Rows
from deepseek_triton.ensemble.engine.runners.cuda.parts.moe import MoeForward, MoeGemv, MoeWeights
from deepseek_triton.ensemble.engine.runners.cuda.parts.part import DecodeStep, Tools
from deepseek_triton.ensemble.engine.runners.cuda.parts.residual import Residual
from deepseek_triton.ensemble.engine.runners.cuda.parts.router import COMPACT_PAIRS, Router, RouterWeights, Routing
from deepseek_triton.ensemble.engine.runners.cuda.plan import EXPERTS, FAST, INVARIANT, KernelPlan

# The interpreter computes masked lanes too, and makes numbers of arrays.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]

HIDDEN, EPS = 80, 1e-6
GREEDY = ExpertOptions(
    num_experts=12, num_experts_per_tok=3, intermediate_size=48, num_shared_experts=2, first_dense_layers=0,
    scores="softmax", choice="greedy",
)  # fmt: skip
GROUP_MAXIMUM = replace(GREEDY, choice="group_maximum", num_groups=4, topk_group=2, scale=16.0)
GROUP_TOP2 = replace(
    GREEDY, scores="sigmoid", choice="group_top2", num_groups=4, topk_group=2, is_normalised=True, scale=2.5
)
ROUTERS = {
    "V2-Lite": replace(GREEDY, num_experts=64, num_experts_per_tok=6),
    "V2": replace(GROUP_MAXIMUM, num_experts=160, num_experts_per_tok=6, num_groups=8, topk_group=3),
    "V3": replace(GROUP_TOP2, num_experts=256, num_experts_per_tok=8, num_groups=8, topk_group=4),
    "greedy normalised": replace(GREEDY, is_normalised=True),
    "group maximum": GROUP_MAXIMUM,
    "group top 2": GROUP_TOP2,
    "one group": replace(GROUP_TOP2, num_groups=1, topk_group=1),
    "top 1 of 1": replace(GREEDY, num_experts=1, num_experts_per_tok=1),
}


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ops(plan: KernelPlan = FAST) -> LinearOps:
    return LinearOps(Launcher(DEVICE, DTYPE, pdl=HAS_GPU), plan, EPS)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.double() - wanted).norm() / wanted.norm())


def route(x: torch.Tensor, weights: RouterWeights, options: ExpertOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformers' routers in float64: which experts [n, k], of equal ones the first, and their weights."""
    logits = x.double() @ weights.weight.double().T
    scores = logits.softmax(-1) if options.scores == "softmax" else logits.sigmoid()
    ranked = scores if weights.bias is None else scores + weights.bias.double()
    if options.choice != "greedy":
        groups = ranked.view(len(x), options.num_groups, -1)
        best = groups.amax(-1) if options.choice == "group_maximum" else groups.topk(2).values.sum(-1)
        is_best = torch.zeros_like(best, dtype=torch.bool).scatter(1, first(best, options.topk_group), True)
        ranked = groups.masked_fill(~is_best[..., None], float("-inf")).flatten(1)
    chosen = first(ranked, options.num_experts_per_tok)
    own = scores.gather(1, chosen)
    return chosen, (own / own.sum(-1, keepdim=True) if options.is_normalised else own) * options.scale


def first(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` largest of each row are; of equal ones the first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def router_weights(options: ExpertOptions, hidden: int = HIDDEN) -> RouterWeights:
    bias = random(options.num_experts, seed=4) * 0.2 if options.choice == "group_top2" else None
    return RouterWeights(random(options.num_experts, hidden, seed=3) * hidden**-0.5, bias)


def routed(
    x: torch.Tensor, weights: RouterWeights, options: ExpertOptions, positions: torch.Tensor | None = None
) -> Routing:
    linear_ops = ops()
    return Router(linear_ops.launch, linear_ops.plan, options, positions)(x, weights)


def unit(column: int, value: float = 1.0) -> torch.Tensor:
    """A token that reads one column of the router."""
    x = torch.zeros(1, HIDDEN, dtype=DTYPE, device=DEVICE)
    x[0, column] = value
    return x


def router_of(logits: list[float], bias: list[float] | None = None) -> RouterWeights:
    """A router that gives `unit(0)` these logits."""
    weight = torch.zeros(len(logits), HIDDEN, device=DEVICE)
    weight[:, 0] = torch.tensor(logits)
    return RouterWeights(weight, None if bias is None else torch.tensor(bias, device=DEVICE))


@pytest.mark.parametrize("rows", [1, 5, *([200] if HAS_GPU else [])])  # more than 64 rows have tiles of their own
@pytest.mark.parametrize("name", ROUTERS)
def test_each_router_chooses_and_weighs_as_transformers_does(name: str, rows: int) -> None:
    options = ROUTERS[name]
    weights, x = router_weights(options), random(rows, HIDDEN, seed=7).to(DTYPE)
    found = routed(x, weights, options)
    chosen, own = route(x, weights, options)
    assert torch.equal(found.chosen.long(), chosen)
    assert error(found.weights, own) < 1e-5


def test_the_hidden_size_of_v3_is_summed_in_parts() -> None:
    options = replace(ROUTERS["V3"], num_experts=32)
    weights, x = router_weights(options, 7168), random(1, 7168, seed=7).to(DTYPE)
    found = routed(x, weights, options)
    chosen, own = route(x, weights, options)
    assert torch.equal(found.chosen.long(), chosen)
    assert error(found.weights, own) < 1e-5


def test_of_equal_scores_the_first_expert_is_chosen() -> None:
    for options in (GREEDY, GROUP_MAXIMUM):
        assert routed(unit(0), router_of([0.0] * 12), options).chosen.tolist() == [[0, 1, 2]]
    assert routed(unit(0), router_of([0.0] * 12, [0.0] * 12), GROUP_TOP2).chosen.tolist() == [[0, 1, 2]]
    assert routed(unit(0), router_of([1.0] + [0.0] * 10 + [1.0]), GREEDY).chosen.tolist() == [[0, 11, 1]]


def test_the_router_computes_in_float32() -> None:
    """The third expert's logit is the best by less than bfloat16 or TF32 tell apart from the second's."""
    logits = [0.0, 1.0, 1.0 + 2.0**-20, *[-1.0] * 9]
    assert routed(unit(0), router_of(logits), GREEDY).chosen.tolist()[0][:2] == [2, 1]


def test_the_correction_bias_is_float32() -> None:
    bias = [0.0, 30.0, 30.0 + 2.0**-16, *[0.0] * 9]  # bfloat16 has both as 30
    assert routed(unit(0), router_of([0.0] * 12, bias), GROUP_TOP2).chosen.tolist()[0][:2] == [2, 1]


def test_the_correction_bias_chooses_and_does_not_weigh() -> None:
    logits, bias = [0.0, 1.0, 2.0, *[3.0] * 9], [5.0, 5.0, 5.0, *[0.0] * 9]
    found = routed(unit(0), router_of(logits, bias), replace(GROUP_TOP2, topk_group=1))
    scores = torch.tensor([2.0, 1.0, 0.0]).double().sigmoid()
    assert found.chosen.tolist() == [[2, 1, 0]]
    assert error(found.weights[0].cpu(), 2.5 * scores / scores.sum()) < 1e-6


def test_a_group_counts_by_the_sum_of_its_two_best() -> None:
    """Group 0 has the best expert, group 1 the best two."""
    bias = [0.9, 0.0, 0.0, 0.6, 0.6, 0.5, *[-1.0] * 6]
    options = replace(GROUP_TOP2, topk_group=1)
    assert routed(unit(0), router_of([0.0] * 12, bias), options).chosen.tolist() == [[3, 4, 5]]


def test_a_group_counts_by_its_best_expert_where_the_choice_says_so() -> None:
    logits = [0.9, 0.0, 0.0, 0.6, 0.6, 0.5, *[-1.0] * 6]
    options = replace(GROUP_MAXIMUM, topk_group=1)
    assert routed(unit(0), router_of(logits), options).chosen.tolist() == [[0, 1, 2]]


def test_experts_outside_the_best_groups_are_not_chosen_though_scores_are_negative() -> None:
    """With a bias scores may be negative; zero in place of the others' would be the best."""
    bias = [-1.0, -1.0, -1.0, *[-2.0] * 9]
    options = replace(GROUP_TOP2, topk_group=1)
    assert routed(unit(0), router_of([0.0] * 12, bias), options).chosen.tolist() == [[0, 1, 2]]


def test_weights_are_normalised_only_where_the_options_say_so() -> None:
    logits = [2.0, 1.0, *[0.0] * 10]
    scores = torch.tensor(logits).double().softmax(-1)[:3]
    plain = routed(unit(0), router_of(logits), replace(GREEDY, scale=3.0)).weights[0].cpu()
    assert error(plain, 3 * scores) < 1e-6
    normalised = routed(unit(0), router_of(logits), replace(GREEDY, is_normalised=True)).weights[0].cpu()
    assert error(normalised, scores / scores.sum()) < 1e-6


def test_rows_without_a_token_choose_no_expert() -> None:
    positions = torch.tensor([3, -1, 0, -1], device=DEVICE)
    found = routed(random(4, HIDDEN).to(DTYPE), router_weights(GREEDY), GREEDY, positions)
    assert (found.chosen[1::2] == GREEDY.num_experts).all()
    assert (found.chosen[::2] < GREEDY.num_experts).all()


CHOICES = {
    "one token": [[4, 2, 7]],
    "all the same experts": [[0, 5, 11]] * 40,
    "the first and the last": [[0, 1, 11]] * 3,
    "rows without a token": [[12, 12, 12], [1, 2, 3], [12, 12, 12], [3, 2, 1]],
    "no token at all": [[12, 12, 12]] * 3,
    "so many pairs that tiles have gaps": [[(7 * i) % 12, (7 * i + 1) % 12, (7 * i + 5) % 12] for i in range(400)],
    "gaps and experts that nobody gets": [[3, 8, 12 if i % 3 else 5] for i in range(400)],
    "more than is read at once": [[(7 * i) % 12, (7 * i + 1) % 12, (7 * i + 5) % 12] for i in range(1500)],
}


@pytest.mark.parametrize("name", CHOICES)
def test_pairs_are_ordered_by_expert_and_cut_into_tiles(name: str) -> None:
    chosen = torch.tensor(CHOICES[name], dtype=torch.int32, device=DEVICE)
    linear_ops = ops()
    found = Router(linear_ops.launch, linear_ops.plan, GREEDY, None).order(chosen)
    pairs = chosen.flatten().tolist()
    wanted = [[p for p, expert in enumerate(pairs) if expert == e] for e in range(12)]
    tiles = [tile for tile in found.tiles.tolist() if tile[0] >= 0]
    if len(pairs) <= COMPACT_PAIRS:
        assert [tile[0] for tile in found.tiles.tolist()[len(tiles) :]] == [-1] * (len(found.tiles) - len(tiles))
    order = found.order.tolist()
    places: list[list[int]] = [[] for _ in range(12)]
    for expert, start, count in tiles:
        assert 0 < count <= found.block
        places[expert] += order[start : start + count]
    assert places == wanted


def codes(x: torch.Tensor) -> torch.Tensor:
    """Codes of 100 x; not clamped they would be NaN past 464."""
    return (x * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def linear(name: str, *shape: int, is_fp8: bool, seed: int) -> DeviceLinear:
    weight = random(*shape, seed=seed)
    if not is_fp8:
        return DeviceLinear(name, (weight * shape[-1] ** -0.5).to(DTYPE), None, None)
    scale = (0.5 + random(*shape[:-1], seed=seed + 1).abs()) / 100 * shape[-1] ** -0.5
    return DeviceLinear(name, codes(weight), scale, None)


def moe_weights(options: ExpertOptions, *, is_fp8: bool, hidden: int = HIDDEN) -> MoeWeights:
    experts, inner = options.num_experts, options.intermediate_size
    shared, shared_size = None, options.num_shared_experts * inner
    if shared_size:
        shared = (
            linear("shared_gate_up", 2 * shared_size, hidden, is_fp8=is_fp8, seed=30),
            linear("shared_down", hidden, shared_size, is_fp8=is_fp8, seed=40),
        )
    return MoeWeights(
        (1 + 0.1 * random(hidden, seed=5)).to(DTYPE), router_weights(options, hidden),
        linear("experts_gate_up", experts, 2 * inner, hidden, is_fp8=is_fp8, seed=10),
        linear("experts_down", experts, hidden, inner, is_fp8=is_fp8, seed=20), shared,
    )  # fmt: skip


def matrix(linear: DeviceLinear) -> torch.Tensor:
    weight = linear.weight.double()
    return weight if linear.scale is None else weight * linear.scale.double()[..., None]


def gated_mlp(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, *, is_fp8: bool, dtype: torch.dtype = DTYPE
) -> torch.Tensor:
    """x @ gate_up.T, activated and kept in `dtype`, @ down.T; is_fp8: both products read codes."""
    gate, up = ((round_rows(x) if is_fp8 else x) @ gate_up.T).chunk(2, dim=-1)
    activated = (torch.nn.functional.silu(gate) * up).to(dtype).double()
    return (round_rows(activated) if is_fp8 else activated) @ down.T


def mixture(hidden: torch.Tensor, weights: MoeWeights, options: ExpertOptions) -> torch.Tensor:
    """What the mixture adds to `hidden` [n, hidden_size], in float64: every expert computed, the chosen ones added.

    Values are rounded where the kernels round them: the router reads the norm in the network's dtype, and codes are
    made of the norm itself. Two roundings one after the other would move 3 % of the codes in bfloat16.
    """
    is_fp8 = weights.gate_up.is_fp8
    normed = rms_norm(hidden.double(), weights.norm.double(), EPS)
    in_dtype = normed.to(DTYPE).double()
    x = normed if is_fp8 else in_dtype
    chosen, own = route(in_dtype, weights.router, options)
    gate_up, down = matrix(weights.gate_up), matrix(weights.down)
    out = torch.zeros_like(x)
    for expert in range(options.num_experts):
        share = (own * (chosen == expert)).sum(-1, keepdim=True)
        out += share * gated_mlp(x, gate_up[expert], down[expert], is_fp8=is_fp8)
    for expert in range(options.num_experts, options.num_experts + weights.num_always):
        out += gated_mlp(x, gate_up[expert], down[expert], is_fp8=is_fp8)
    if weights.shared is not None:
        # The dense kernels make codes of what isn't rounded.
        dtype = torch.float64 if is_fp8 else DTYPE
        out += gated_mlp(x, *(matrix(linear) for linear in weights.shared), is_fp8=is_fp8, dtype=dtype)
    return out


def run(
    hidden: torch.Tensor,
    weights: MoeWeights,
    options: ExpertOptions,
    plan: KernelPlan = FAST,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    residual = Residual(hidden.clone())
    MoeForward(ops(plan), options, positions)(residual, weights)
    assert isinstance(residual.pending, Parts)
    return in_order(residual.pending)


def in_order(parts: Parts) -> torch.Tensor:
    """The sum of the parts as the next norm takes it."""
    total = parts.tensor[0].float()
    for part in parts.tensor[1:]:
        total = total + part.float()
    return total


TOLERANCE = 2e-2 if torch.bfloat16 == DTYPE else 3e-3  # with codes, a value on a border may fall either way


@pytest.mark.parametrize("is_fp8", [True, False])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("options", [GREEDY, GROUP_TOP2, replace(GREEDY, num_shared_experts=0)])
def test_a_mixture_of_experts_against_float64(options: ExpertOptions, rows: int, is_fp8: bool) -> None:
    weights, hidden = moe_weights(options, is_fp8=is_fp8), random(rows, HIDDEN, seed=9)
    for own in (weights, weights.stacked()) if options.num_shared_experts else (weights,):
        assert error(run(hidden, own, options), mixture(hidden, own, options)) < TOLERANCE


@pytest.mark.parametrize("is_fp8", [True, False])
@pytest.mark.parametrize("options", [GREEDY, GROUP_TOP2])
def test_one_rows_own_kernels_add_the_mixture_to_the_residual(options: ExpertOptions, is_fp8: bool) -> None:
    weights, hidden = moe_weights(options, is_fp8=is_fp8).stacked(), random(1, HIDDEN, seed=9)
    linear_ops, shape = ops(), DecoderShape(96, HIDDEN, 32, 1, 4, 4, 40, EPS, 64)
    gemv, nothing = DecodeGemv(linear_ops.launch, FAST, EPS), torch.zeros(1, device=DEVICE)
    gemv.attention_amax.fill_(7.0)
    for position in (5, -1):
        step = DecodeStep(torch.tensor([position], device=DEVICE), nothing, gemv.attention_amax)
        found, part = hidden.clone(), MixtureOfExperts(HIDDEN, options)
        MoeGemv(gemv, Tools(linear_ops, shape, nothing, nothing), part, step)(found, weights)
        if position < 0:
            assert torch.equal(found, hidden), "a row without a token"
        else:
            assert error(found.double() - hidden.double(), mixture(hidden, weights, options)) < TOLERANCE
        assert (float(gemv.attention_amax), int(gemv.finished)) == (0.0, 0)


@pytest.mark.parametrize("is_fp8", [True, False])
def test_shared_experts_are_the_same_in_the_stacks(is_fp8: bool) -> None:
    weights, hidden = moe_weights(GREEDY, is_fp8=is_fp8), random(2, HIDDEN, seed=9)
    stacked = weights.stacked()
    assert (stacked.shared, stacked.num_always) == (None, 2)
    # A token has one scale for both shared experts, or one for each.
    assert error(mixture(hidden, stacked, GREEDY), mixture(hidden, weights, GREEDY)) < (3e-2 if is_fp8 else 1e-12)


def test_shared_experts_stored_otherwise_stay_apart() -> None:
    weights, hidden = moe_weights(GREEDY, is_fp8=True), random(2, HIDDEN, seed=9)
    mixed = replace(weights, shared=moe_weights(GREEDY, is_fp8=False).shared)
    assert mixed.stacked() is mixed
    assert torch.isfinite(run(hidden, mixed, GREEDY)).all()


@pytest.mark.parametrize("block", EXPERTS)
@pytest.mark.parametrize("is_fp8", [True, False])
def test_every_size_of_tile(is_fp8: bool, block: int) -> None:
    """Experts that no token, one token and more than a tile of tokens get."""
    plan = replace(FAST, experts={block: EXPERTS[block]})
    linear_ops, rows = ops(plan), block + 3
    forward = MoeForward(linear_ops, GREEDY, None)
    chosen = torch.tensor([[0, 5, 11]] * rows, dtype=torch.int32, device=DEVICE)
    chosen[1, 1], chosen[-1] = 7, GREEDY.num_experts
    order = Router(linear_ops.launch, plan, GREEDY, None).order(chosen)
    own_weights = random(rows, 3, seed=7)
    routing = Routing(chosen, own_weights, GREEDY.num_experts, order)
    matrices = [linear("experts_gate_up", 12, 2 * 48, 256, is_fp8=is_fp8, seed=10),
                linear("experts_down", 12, 48, 160, is_fp8=is_fp8, seed=20)]  # fmt: skip
    for weights, repeats in zip(matrices, (3, 1), strict=True):
        values = random(rows * 3 // repeats, weights.weight.shape[-1], seed=9)
        x = Rows(values.to(DTYPE), None)
        if is_fp8:
            x = Rows(codes(values), 0.01 * random(len(values), seed=8).abs())
        found = forward.multiply(x, weights, routing).double()
        found = found.view(rows, 3, -1) if repeats > 1 else found.transpose(0, 1)
        exact = x.values.double() * (1 if x.scale is None else x.scale.double()[:, None])
        for expert in (0, 5, 7, 11):
            wanted = exact.repeat_interleave(repeats, 0) @ matrix(weights)[expert].T
            if repeats > 1:
                gate, up = wanted.chunk(2, dim=-1)
                wanted = torch.nn.functional.silu(gate) * up
            else:
                wanted = wanted * own_weights.view(-1, 1).double()
            own = chosen == expert
            assert error(found[own], wanted.view(rows, 3, -1)[own]) < (5e-3 if torch.bfloat16 == DTYPE else 1e-5)


def test_rows_without_a_token_change_nothing() -> None:
    weights, hidden = moe_weights(GREEDY, is_fp8=True).stacked(), random(4, HIDDEN, seed=9)
    positions = torch.tensor([0, -1, 5, -1], device=DEVICE)
    hidden[positions < 0] = torch.nan
    found = run(hidden, weights, GREEDY, positions=positions)[positions >= 0]
    assert torch.equal(found, run(hidden[positions >= 0], weights, GREEDY))


@pytest.mark.parametrize("is_fp8", [True, False])
def test_a_row_is_the_same_in_every_batch(is_fp8: bool) -> None:
    options = replace(GREEDY, num_experts=4)  # twelve tokens have another size of tile than one
    weights, hidden = moe_weights(options, is_fp8=is_fp8).stacked(), random(12, HIDDEN, seed=9)
    alone = run(hidden[:1], weights, options, INVARIANT)
    for rows in (2, 12):
        assert torch.equal(run(hidden[:rows], weights, options, INVARIANT)[:1], alone)


@pytest.mark.parametrize("is_fp8", [True, False])
@pytest.mark.parametrize("options", [GREEDY, replace(GREEDY, num_shared_experts=0)])
def test_one_rows_experts_are_activated_and_their_largest_magnitudes_known(
    options: ExpertOptions, is_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, hidden = moe_weights(options, is_fp8=is_fp8), random(1, HIDDEN, seed=9)
    weights = weights.stacked() if options.num_shared_experts else weights
    linear_ops = ops()
    gemv = DecodeGemv(linear_ops.launch, FAST, EPS)
    empty = linear_ops.launch.empty
    # Memory that nobody has written holds anything.
    monkeypatch.setattr(linear_ops.launch, "empty", lambda *size, **kind: empty(*size, **kind).fill_(77))
    router = Router(linear_ops.launch, FAST, options, None)
    normed, plain, routing = router.normed(
        hidden, weights.norm, weights.router, gemv, eps=EPS, is_fp8=is_fp8, num_always=weights.num_always
    )
    activated = gemv.activate_experts(normed if is_fp8 else Rows(plain, None), routing, weights.gate_up)
    assert torch.equal(routing.amax, activated.float().abs().amax(1))
    normed_exact = rms_norm(hidden.double(), weights.norm.double(), EPS)
    x = round_rows(normed_exact) if is_fp8 else normed_exact.to(DTYPE).double()
    gate, up = (matrix(weights.gate_up)[routing.chosen.long()] @ x[0]).chunk(2, dim=-1)
    assert error(activated, torch.nn.functional.silu(gate) * up) < TOLERANCE


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "is_fp8"), list(itertools.product([1, 64], [True, False])))
def test_a_captured_graph_routes_the_tokens_of_its_replay(rows: int, is_fp8: bool) -> None:
    weights, hidden = moe_weights(GROUP_TOP2, is_fp8=is_fp8).stacked(), random(rows, HIDDEN, seed=9)
    forward, inputs = MoeForward(ops(), GROUP_TOP2, None), torch.zeros_like(hidden)

    def step() -> torch.Tensor:
        residual = Residual(inputs)
        forward(residual, weights)
        assert residual.pending is not None
        return in_order(residual.pending)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        hidden = random(rows, HIDDEN, seed=seed)
        inputs.copy_(hidden)
        graph.replay()
        assert torch.equal(captured, run(hidden, weights, GROUP_TOP2))
