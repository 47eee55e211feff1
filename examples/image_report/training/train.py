"""Train the ResNet on synthetic tiles, fit its temperatures, and write what is served.

    python -m deepseek_triton.examples.image_report.training.train

Seeds below TEST_SEED train and calibrate; the benchmark measures on seeds from there on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepseek_triton.command_parser import CommandParser
from deepseek_triton.examples.image_report.classifier import GRAPH_FILE
from deepseek_triton.examples.image_report.findings import CALIBRATION_FILE, FINDINGS, TemperatureScaling
from deepseek_triton.examples.image_report.tiles import make_tile
from deepseek_triton.examples.image_report.training.export import export
from deepseek_triton.examples.image_report.training.resnet import ResNet

DATA = Path(__file__).parents[1] / "data"
CALIBRATION_SEED = 1_000_000
TEST_SEED = 2_000_000
BATCH_SIZE = 32

Pixels = NDArray[np.float32]


def tiles(first_seed: int, number: int) -> tuple[Pixels, NDArray[np.bool_]]:
    """Pixels [number, 3, h, w] in 0 to 1, and the truths [number, findings], of consecutive seeds."""
    made = [make_tile(seed) for seed in range(first_seed, first_seed + number)]
    pixels = np.stack([np.asarray(tile.image, np.float32).transpose(2, 0, 1) / 255 for tile in made])
    return pixels, np.array([tile.truths for tile in made])


def train(pixels: Pixels, truths: NDArray[np.bool_], epochs: int, seed: int = 0) -> ResNet:
    """A ResNet that was fitted to the tiles, which are turned and mirrored at random."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = ResNet()
    x, y = torch.from_numpy(pixels), torch.from_numpy(truths.astype(np.float32))
    steps = epochs * -(-len(x) // BATCH_SIZE)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for rows in torch.split(torch.randperm(len(x)), BATCH_SIZE):
            turned = torch.rot90(x[rows], int(random.integers(4)), (2, 3))
            if random.random() < 0.5:
                turned = turned.flip(3)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(turned), y[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}: loss {total / len(x):.3f}, {time.perf_counter() - start:.1f} s", flush=True)
    return model.eval()


def logits_of(model: ResNet, pixels: Pixels) -> NDArray[np.float64]:
    """The logits [n, findings]."""
    with torch.no_grad():
        parts = [model(part) for part in torch.split(torch.from_numpy(pixels), 128)]
    logits: NDArray[np.float64] = torch.cat(parts).double().numpy()
    return logits


def fit_temperatures(logits: NDArray[np.float64], truths: NDArray[np.bool_]) -> tuple[float, ...]:
    """For each finding the temperature under which its truths are the likeliest."""
    candidates = np.exp(np.linspace(np.log(0.25), np.log(8.0), 281))

    def loss(temperature: float, finding: int) -> float:
        signs = np.where(truths[:, finding], 1.0, -1.0)
        return float(np.logaddexp(0.0, -signs * logits[:, finding] / temperature).mean())

    best = (min(candidates, key=lambda value: loss(value, finding)) for finding in range(len(FINDINGS)))
    return tuple(round(float(value), 3) for value in best)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and write; returns the exit status."""
    parser: Any = CommandParser(description="Train the ResNet of the image report on synthetic tiles.")
    parser.add_argument("--tiles", type=int, default=2400, help="tiles to train on (default: %(default)s)")
    parser.add_argument("--calibration-tiles", type=int, default=800, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DATA, help="the directory that is written (default: %(default)s)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    model = train(*tiles(0, options.tiles), options.epochs)
    export(model, options.out / GRAPH_FILE)
    pixels, truths = tiles(CALIBRATION_SEED, options.calibration_tiles)
    logits = logits_of(model, pixels)
    calibration = TemperatureScaling(fit_temperatures(logits, truths))
    calibration.save(options.out / CALIBRATION_FILE)
    accuracy = ((logits > 0) == truths).mean(axis=0)
    for name, share, temperature in zip(FINDINGS, accuracy, calibration.temperatures, strict=True):
        print(f"{name:18} accuracy {share:.3f}, temperature {temperature:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
