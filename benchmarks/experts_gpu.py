"""Time of one mixture of experts in the cuda runner, by number of tokens, beside the floor of its bytes and products.

`python -m benchmarks.experts_gpu`: random weights in FP8 (or --bf16), tokens that prefer some experts, CUDA graphs.
Each replay has other tokens than the one before. Prints microseconds a layer, kernel by kernel.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch

from deepseek_triton.ensemble.decoder.options import ExpertOptions
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.linear import DeviceLinear, LinearOps
from deepseek_triton.ensemble.engine.runners.cuda.parts.moe import MoeForward, MoeWeights
from deepseek_triton.ensemble.engine.runners.cuda.parts.residual import Residual
from deepseek_triton.ensemble.engine.runners.cuda.parts.router import Router, RouterWeights
from deepseek_triton.ensemble.engine.runners.cuda.plan import FAST, INVARIANT, ExpertTile

GB_PER_S = {"H200": 4800, "H100": 3350}
FP8_TFLOPS, BF16_TFLOPS = 1979, 989
SHAPES = {  # options and hidden size
    "v2-lite": (ExpertOptions(64, 6, 1408, 2, 1, "softmax", "greedy"), 2048),
    "v3": (ExpertOptions(256, 8, 2048, 1, 3, "sigmoid", "group_top2", 8, 4, True, 2.5), 7168),
}
DEVICE = torch.device("cuda")


def random_weights(options: ExpertOptions, hidden: int, *, is_fp8: bool) -> MoeWeights:
    """One layer's."""

    def linear(name: str, *shape: int) -> DeviceLinear:
        weight = torch.empty(shape, dtype=torch.float8_e4m3fn if is_fp8 else torch.bfloat16, device=DEVICE)
        for part in torch.split(weight.view(-1, shape[-1]), 2**27 // shape[-1]):
            noise = torch.randn(part.shape, device=DEVICE) * (100 if is_fp8 else shape[-1] ** -0.5)
            part.copy_(noise.clamp(-448, 448))
        scale = torch.full(shape[:-1], shape[-1] ** -0.5 / 100, device=DEVICE) if is_fp8 else None
        return DeviceLinear(name, weight, scale, None)

    experts, inner = options.num_experts, options.intermediate_size
    shared = options.num_shared_experts * inner
    bias = torch.zeros(experts, device=DEVICE) if options.choice == "group_top2" else None
    router = RouterWeights(torch.randn(experts, hidden, device=DEVICE) * hidden**-0.5, bias)
    return MoeWeights(
        torch.ones(hidden, dtype=torch.bfloat16, device=DEVICE), router,
        linear("experts_gate_up", experts, 2 * inner, hidden), linear("experts_down", experts, hidden, inner),
        (linear("shared_gate_up", 2 * shared, hidden), linear("shared_down", hidden, shared)),
    )  # fmt: skip


def floor_us(options: ExpertOptions, hidden: int, tokens: int, hit: float, *, is_fp8: bool) -> float:
    """The least time that the GPU's memory and tensor cores allow, where the tokens hit so many experts."""
    matrix = 3 * options.intermediate_size * hidden
    num_bytes = (hit + options.num_shared_experts) * matrix * (1 if is_fp8 else 2) + 4 * options.num_experts * hidden
    flops = 2 * tokens * (options.num_experts_per_tok + options.num_shared_experts) * matrix
    rate = next((rate for name, rate in GB_PER_S.items() if name in torch.cuda.get_device_name()), 3350)
    return max(num_bytes / rate / 1e3, flops / (FP8_TFLOPS if is_fp8 else BF16_TFLOPS) / 1e6)


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `step`, whose kernels are compiled first."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def measure(name: str, tokens: int, weights: list[MoeWeights], args: argparse.Namespace) -> None:
    """Print one line for each number of tokens, then one for each kernel."""
    options, hidden = SHAPES[name]
    plan = INVARIANT if args.invariant else FAST
    if args.tile:
        block, bn, down_bn, row_bytes, num_warps, num_stages, fast = args.tile
        plan = replace(plan, experts={block: ExpertTile(bn, down_bn, row_bytes, num_warps, num_stages, bool(fast))})
    ops = LinearOps(Launcher(DEVICE, torch.bfloat16, pdl=True), plan, 1e-6)
    forward, router = MoeForward(ops, options, None), Router(ops.launch, ops.plan, options, None)
    common = torch.randn(hidden, device=DEVICE)
    inputs = [torch.randn(tokens, hidden, device=DEVICE) + 0.5 * common for _ in weights]

    def step() -> None:
        for own, rows in zip(weights, inputs, strict=True):
            forward(Residual(rows), own)

    graph = captured(step)
    hit = 0.0
    for own, rows in zip(weights, inputs, strict=True):
        routing = router(ops.norm(rows, None, None, own.norm, False).values, own.router)
        hit += len(torch.unique(routing.chosen)) / len(weights)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    best = float("inf")
    for _ in range(args.repeats):
        for rows in inputs:
            rows.copy_(torch.randn_like(rows) + 0.5 * common)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / len(weights))
    floor = floor_us(options, hidden, tokens, hit, is_fp8=not args.bf16)
    print(f"{name} {tokens} tokens, {hit:.0f} experts: {best:.1f} us, floor {floor:.1f} us ({floor / best:.0%})")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        kernels[event.name].append(event.device_time)
    for kernel, times in sorted(kernels.items(), key=lambda item: -sum(item[1])):
        print(f"    {sum(times) / len(weights):8.1f} us  {len(times) // len(weights)} x {kernel[:60]}", flush=True)


def main() -> None:
    """Measure every shape and number of tokens asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 256, 2048])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--shared-apart", action="store_true", help="shared experts as dense products")
    parser.add_argument("--tile", nargs=7, type=int, help="tokens and then ExpertTile's fields, fast_sums as 0 or 1")
    parser.add_argument("--invariant", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    for name in args.shapes:
        options, hidden = SHAPES[name]
        layer_bytes = 3 * options.num_experts * options.intermediate_size * hidden * (2 if args.bf16 else 1)
        layers = max(1, min(4, 24 * 2**30 // layer_bytes))  # more than one, so that no layer stays in the L2 cache
        weights = [random_weights(options, hidden, is_fp8=not args.bf16) for _ in range(layers)]
        if not args.shared_apart:
            weights = [own.stacked() for own in weights]
        for tokens in args.tokens:
            measure(name, tokens, weights, args)


if __name__ == "__main__":
    main()
