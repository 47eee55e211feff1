"""Time of latent attention's decoding in the cuda runner, by tile: python -m benchmarks.latent_attention_gpu

One layer of DeepSeek-V2-Lite (or --heads 128, V3's), entries in pages that lie in no order, CUDA graphs. Prints
microseconds of the three kernels together beside those that the entries' bytes take at the GPU's rated bandwidth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from deepseek_triton.ensemble.decoder.mla import LatentAttention
from deepseek_triton.ensemble.decoder.options import LatentOptions
from deepseek_triton.ensemble.engine.runners.cuda.caches import PAGE, Caches
from deepseek_triton.ensemble.engine.runners.cuda.latent import LatentKernels, LatentTile, Projected
from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
from deepseek_triton.ensemble.engine.runners.cuda.linear import Parts
from deepseek_triton.ensemble.engine.runners.cuda.plan import FAST

GB_PER_S = 3350  # an H100 SXM's
DEVICE = torch.device("cuda")
REPEATS = 20  # layers in a graph, each with entries of its own, so that few of them are in the cache of the GPU
TILES = (
    LatentTile(16, 32, 4, 4),
    LatentTile(16, 32, 4, 5),
    LatentTile(16, 64, 4, 3),
    LatentTile(16, 64, 8, 3),
    LatentTile(16, 64, 4, 5),
)
MANY_TILES = (LatentTile(16, 32, 4, 5), LatentTile(32, 32, 8, 4), LatentTile(32, 32, 8, 5), LatentTile(64, 64, 8, 2))


def median_us(run: Callable[[], None]) -> float:
    """Microseconds of a captured graph of `run`, the median of 9 replays."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times: list[float] = []
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(12):
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) * 1e3)
    return sorted(times[3:])[4]


def measure(heads: int, rows: int, length: int, tile: LatentTile) -> tuple[float, float]:
    """Microseconds of a layer, and those of its entries' bytes."""
    part = LatentAttention(2048, heads, LatentOptions(None, 512, 128, 64, 128))
    width = -(-length // PAGE)
    layers = max(1, min(REPEATS, 2**32 // (rows * width * PAGE * part.entry_size * 2)))
    entries = torch.randn(layers, rows * width, 1, PAGE, part.entry_size, device=DEVICE, dtype=torch.bfloat16)
    table = torch.randperm(rows * width, device=DEVICE).view(rows, width).int()
    angles = torch.rand(length, 32, device=DEVICE)
    launch = Launcher(DEVICE, torch.bfloat16, pdl=True)
    kernels = LatentKernels(launch, FAST, part, torch.cos(angles), torch.sin(angles), tile)
    projected = torch.randn(4, rows, heads * 192 + 576, device=DEVICE)
    inputs = Projected(Parts(projected), None, Parts(projected), None, heads * 192)
    norm = torch.ones(512, device=DEVICE, dtype=torch.bfloat16)
    kv_b = torch.randn(heads, 256, 512, device=DEVICE, dtype=torch.bfloat16)
    positions = torch.full((rows,), length - 1, device=DEVICE)
    out = torch.empty(rows, heads * 128, device=DEVICE)

    def run() -> None:
        for layer in range(layers):
            cache = Caches(entries[layer], entries[layer], table)
            queries, _ = kernels.rows(inputs, norm, kv_b, None, positions, cache)
            kernels.decode(queries, kv_b, positions, cache, out)

    floor = (rows * length * part.entry_size * 2 + kv_b.nbytes) / GB_PER_S / 1e3
    return median_us(run) / layers, floor


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--heads", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256], help="default: %(default)s")
    parser.add_argument("--lengths", type=int, nargs="+", default=[600, 4096], help="default: %(default)s")
    arguments = parser.parse_args()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream), torch.no_grad():
        for tile in TILES if arguments.heads <= 16 else MANY_TILES:
            for rows in arguments.rows:
                for length in arguments.lengths:
                    taken, floor = measure(arguments.heads, rows, length, tile)
                    print(
                        f"{tile}: {rows} rows of {length} tokens: {taken:.1f} us, floor {floor:.1f} us "
                        f"({floor / taken:.0%})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
