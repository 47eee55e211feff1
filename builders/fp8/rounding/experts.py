"""The experts of a layer in FP8, each compensated on the tokens that the router gives it.

An expert that saw few tokens is rounded by itself, as recipe fast does it: its second moment would say little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.calibrate import MIN_TOKENS, Calibration
from deepseek_triton.builders.fp8.forward.values import rounded_input
from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays
from deepseek_triton.builders.fp8.rounding.compensate import SecondMoment, compensated_codes
from deepseek_triton.builders.fp8.rounding.e4m3 import Float32, least_weight_error_scale, max_scale
from deepseek_triton.builders.graph.float8 import Float8Linear
from deepseek_triton.ensemble.decoder.moe import expert_modules

NAMED = 8  # experts that `describe_few` names
# (weight [out, in], mean square of each channel [in]) → its scale
Scale = Callable[[Float32, NDArray[Any]], Float32]


@dataclass(frozen=True)
class ExpertInputs:
    """What a layer's experts read in the calibration's windows.

    tokens: [n, hidden_size]. chosen: [n, num_experts_per_tok], the experts of each token.
    """

    tokens: Array
    chosen: NDArray[np.int64]

    def of(self, expert: int, arrays: Arrays) -> Array:
        """The tokens [m, hidden_size] that one expert got."""
        return self.tokens[arrays.index(np.nonzero(self.chosen == expert)[0])]


def compensated_expert(
    weights: Mapping[str, Float32], expert: int, rows: Array, scale_of: Scale, arrays: Arrays
) -> dict[str, Float8Linear]:
    """An expert's three matrices; rows: [m, hidden_size], its tokens."""
    gate, up, down = expert_modules(expert)

    def moment_of(values: Array) -> SecondMoment:
        moment = SecondMoment(values.shape[-1], arrays)
        moment.add(rounded_input(values, None, arrays))
        return moment

    gates = rows @ arrays.put(weights[f"{gate}.weight"]).T
    product = gates * (0.5 + 0.5 * arrays.xp.tanh(0.5 * gates)) * (rows @ arrays.put(weights[f"{up}.weight"]).T)
    moments = {(gate, up): moment_of(rows), (down,): moment_of(product)}
    linears = {}
    for modules, moment in moments.items():
        own = [weights[f"{module}.weight"] for module in modules]
        scales = [np.broadcast_to(scale_of(weight, moment.diagonal()), len(weight)) for weight in own]
        codes = compensated_codes(np.concatenate(own), np.concatenate(scales), moment)
        for module, code, scale in zip(modules, np.split(codes, len(modules)), scales, strict=True):
            linears[module] = Float8Linear(code, scale, None, None)
    return linears


def rounded_expert_layer(
    weight: Float32, dtype: np.dtype[Any], arrays: Arrays, *, is_per_tensor: bool, by_maximum: bool
) -> Float8Linear:
    """A matrix rounded by itself. by_maximum: its scales are those of the largest magnitudes."""
    placed = arrays.place(weight)
    if by_maximum:
        amax = arrays.row_amax(placed)
        scale = max_scale(amax.max() if is_per_tensor else amax, dtype)
    else:
        scale = least_weight_error_scale(placed, dtype, is_per_tensor=is_per_tensor, arrays=arrays)
    return Float8Linear(arrays.encode_rows(placed, np.broadcast_to(scale, len(weight))), scale, None, None)


def saw_few(calibration: Calibration, prefix: str, expert: int) -> bool:
    """Whether an expert got too few tokens of the calibration's text to be compensated."""
    return calibration.experts[prefix][expert] < MIN_TOKENS


def describe_few(calibration: Calibration) -> str | None:
    """A line for the user on the experts that saw few tokens; None: there are none."""
    few = [
        f"{prefix}mlp.experts.{expert} ({tokens})"
        for prefix, counts in calibration.experts.items()
        for expert, tokens in enumerate(counts)
        if tokens < MIN_TOKENS
    ]
    if not few:
        return None
    total = sum(map(len, calibration.experts.values()))
    more = f" and {len(few) - NAMED} more" if len(few) > NAMED else ""
    return (
        f"{len(few)} of {total} experts saw fewer than {MIN_TOKENS} tokens of the calibration's text and are rounded "
        f"without it, as by recipe fast: {', '.join(few[:NAMED])}{more}; a longer --calibration-text reaches more"
    )
