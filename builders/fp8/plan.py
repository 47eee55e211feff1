"""How long a recipe will take here, from the model's shapes and rates measured just now; and which one fits a budget.

The estimate is for the choice and for the user's patience, not a promise: it counts matrix products, the rounding of
columns, the search of scales and the bytes that are read, and leaves out what is short beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deepseek_triton.builders.fp8.journal import journal_directory
from deepseek_triton.builders.fp8.recipe import DEFAULT_RECIPE, RECIPES, Recipe
from deepseek_triton.builders.fp8.rounding.arrays import Arrays, best_arrays
from deepseek_triton.builders.fp8.rounding.compensate import LAZY_BLOCK, MAX_BLOCK, round_block
from deepseek_triton.builders.fp8.rounding.e4m3 import OCTAVE, SCALE_CANDIDATES
from deepseek_triton.builders.fp8.texts import calibration_text
from deepseek_triton.ensemble.decoder.spec import ModelSpec

if TYPE_CHECKING:
    from deepseek_triton.builders.repository.options import BuildOptions

CHOSEN_FROM = (DEFAULT_RECIPE, "fast")  # the best first
READ_BYTES_PER_S = 8e8  # of a checkpoint: a disk's rate can't be measured without emptying the system's cache
BYTES_PER_TOKEN = 4  # of text
FORWARD_PASSES = 3  # one calibrates, one measures moments, one goes through the quantised layer
SAMPLED_S = 1.1e-8  # of a logit of a generated token, on the processor
# What a GPU takes beside arithmetic, fitted to two builds on an H100 (benchmarks/results/fp8-build-gpu.json):
START_S = 3.0  # of the GPU's libraries
LAYER_STEP_S = 1.5e-3  # of starting a layer's kernels for a generated token
TOKEN_S = 3e-5  # of a token in a layer: starting kernels, statistics to the processor, the journal
CALIBRATED_S, COMPENSATED_S = 2e-9, 2e-8  # of a weight that is converted, copied to the GPU and back, and written
DENSE, FEW_ROWS = 1024, 128
MANY_ROWS, MANY_ROWS_OF_GPU = 512, 8192
REPEATS = 3  # of a measurement; the fastest counts
PROMPTS = 20  # that the model continues at once


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second, or how many seconds it takes.

    flops: floating-point operations of float32 matrix products. weights: searched for a scale, a candidate each.
    column_s, element_s: rounding a column with compensation takes column_s + rows · element_s seconds.
    """

    flops: float
    weights: float
    column_s: float
    element_s: float

    @classmethod
    def measured(cls, arrays: Arrays) -> Rates:
        """Measure them, in less than a second."""
        many_rows = MANY_ROWS_OF_GPU if arrays.is_gpu else MANY_ROWS
        random = np.random.default_rng(0).standard_normal((many_rows, DENSE)).astype(np.float32)
        here = arrays.put(random)

        def multiply() -> None:
            arrays.get((here @ here.T)[0, :1])  # which waits for a GPU

        amax = arrays.row_amax(here)
        rounding = _seconds(lambda: arrays.row_errors(here, amax, (1.0, 1.5)))
        factor = arrays.put(np.eye(LAZY_BLOCK, dtype=np.float32))

        def column(rows: int) -> float:
            block = arrays.put(random.T[:LAZY_BLOCK, :rows].copy())
            return _seconds(lambda: arrays.get(round_block(block, factor, arrays)[0, :1])) / LAZY_BLOCK

        few, many = column(FEW_ROWS), column(many_rows)
        element_s = max(0.0, many - few) / (many_rows - FEW_ROWS)
        return cls(
            flops=2 * many_rows * many_rows * DENSE / _seconds(multiply),
            weights=2 * random.size / rounding,
            column_s=max(few - FEW_ROWS * element_s, 1e-6),
            element_s=element_s,
        )


def _seconds(work: Callable[[], object]) -> float:
    work()  # libraries prepare themselves at the first call
    least = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - began)
    return max(least, 1e-9)


def estimated_seconds(recipe: Recipe, spec: ModelSpec, rates: Rates, num_tokens: int, *, is_gpu: bool) -> float:
    """How long a build takes that calibrates on `num_tokens` tokens, the target's own work left out."""
    num_bytes = 2 * spec.num_parameters()
    total = num_bytes / READ_BYTES_PER_S + (START_S if is_gpu else 0)
    shapes = [spec.layer_shapes(layer) for layer in range(spec.num_layers)]
    in_layers = sum(float(np.prod(shape)) for layer in shapes for shape in layer.values())
    candidates = len(OCTAVE) if recipe.scales == "least_weight_error" else len(SCALE_CANDIDATES) + 1
    total += in_layers * (candidates if recipe.scales != "max" else 1) / rates.weights
    if not recipe.needs_calibration:
        return total
    total += num_bytes / READ_BYTES_PER_S + 2 * num_tokens * in_layers / rates.flops
    step_s = PROMPTS * (2 * spec.num_parameters() / rates.flops + spec.vocab_size * SAMPLED_S)
    step_s += spec.num_layers * LAYER_STEP_S if is_gpu else 0
    total += calibration_text.GENERATED_TOKENS * step_s
    if is_gpu:
        total += spec.num_layers * num_tokens * TOKEN_S + in_layers * CALIBRATED_S
    if recipe.rounding != "compensated":
        return total
    total += in_layers * COMPENSATED_S if is_gpu else 0
    total += (FORWARD_PASSES - 1) * 2 * num_tokens * in_layers / rates.flops  # the file is read meanwhile
    for layer in range(spec.num_layers):
        experts = [modules for part in spec.parts(layer) for stack in part.stacked.values() for modules in stack]
        for modules in (*(tap.modules for tap in spec.taps(layer)), *experts):
            readers = [shapes[layer][f"{module}.weight"] for module in modules]
            rows, columns = sum(shape[0] for shape in readers), readers[0][1]
            block = min(columns, MAX_BLOCK)
            total += columns * (rates.column_s + rows * rates.element_s)
            total += (rows * columns * block + 2 * num_tokens * columns * block) / rates.flops
            total += 3 * columns * block * block / rates.flops  # the factors of the moments, in float64
    return total


def planned(options: BuildOptions, spec: ModelSpec, say: Callable[[str], None], compile_s: float = 0.0) -> BuildOptions:
    """The options with their recipe: the one that was asked for, else the best that ends within the budget.

    say: called with a line that tells how long it will take, and how to insist on another recipe. compile_s: seconds
        of the budget that the target's compiler takes afterwards.
    """
    if options.precision != "fp8":
        return options
    arrays = best_arrays()
    rates = Rates.measured(arrays)
    num_tokens = _num_tokens(options.calibration_text)

    def seconds(name: str) -> float:
        return estimated_seconds(RECIPES[name], spec, rates, num_tokens, is_gpu=arrays.is_gpu)

    where = "on the GPU" if arrays.is_gpu else "on the processor"
    if options.recipe is not None:
        say(f"recipe {options.recipe} will take some {describe_seconds(seconds(options.recipe))} {where}")
        return options
    unfinished = journal_directory(options.repository, options.name)
    if any(unfinished.glob("calibrate-*")):
        done = len(list(unfinished.glob("quantize-*/layer-*.npz")))
        say(f"going on where a killed build of {options.name} was: {done} of {spec.num_layers} layers are quantised")
        return replace(options, recipe=DEFAULT_RECIPE)
    # Ranges, or a text to take them on, are given for a recipe that reads them.
    names = CHOSEN_FROM[:1] if options.ranges or options.calibration_text else CHOSEN_FROM
    chosen = next((name for name in names if seconds(name) + compile_s <= options.budget * 60), names[-1])
    told = f"recipe {chosen} will take some {describe_seconds(seconds(chosen))} {where}"
    if chosen != CHOSEN_FROM[0]:
        best = CHOSEN_FROM[0]
        told += (
            f"; {best}, which is nearer to the float model, some {describe_seconds(seconds(best))}, more than the "
            f"budget of {options.budget:g} minutes: insist with --recipe {best}, or raise --budget"
        )
    say(told)
    return replace(options, recipe=chosen)


def _num_tokens(text: Path | None) -> int:
    if text is None:
        size = sum(path.stat().st_size for path in calibration_text.DATA.iterdir() if path.is_file())
        return size // BYTES_PER_TOKEN + PROMPTS * calibration_text.GENERATED_TOKENS
    size = text.stat().st_size if text.is_file() else 0
    return min(calibration_text.MAX_TOKENS, size // BYTES_PER_TOKEN)


def describe_seconds(seconds: float) -> str:
    """8 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
