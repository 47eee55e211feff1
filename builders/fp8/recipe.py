"""Recipe: the one answer to «what precision has module X», and how its numbers are chosen.

Frozen data; `quantizer.py` carries it out. The named recipes are those that benchmarks/fp8_quality.py compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.decoder.architectures import LINEAR_MODULES

Precision = Literal["fp8", "network"]
WeightScaling = Literal["per_channel", "per_tensor"]
Activations = Literal["static", "dynamic"]
Rounding = Literal["nearest", "compensated"]
Scales = Literal["max", "least_error"]


@dataclass(frozen=True)
class Recipe:
    """How a decoder becomes FP8.

    weights: one scale for each output channel, or one for the tensor.
    activations: a static scale for each tensor, from calibration; or dynamic, each token's own: a few large
        activations of one token, as every language model has, then don't coarsen all the others.
    rounding: each weight to the nearest code; or compensated: the error of each input channel is made up for by the
        channels after it (GPTQ), against the inputs that calibration saw.
    scales: by the largest magnitude, or by the least squared error of what the layer gives out.
    smoothing: SmoothQuant's exponent, how much of the activations' spread moves into the weights; 0: none.
    bias_correction: add what rounding took from the mean output.
    keep: patterns of module names (`*` any characters) that keep the network's precision.
    extra_bytes: how much larger the artefact may become, as a fraction, by keeping the most sensitive layers.
    """

    weights: WeightScaling = "per_channel"
    activations: Activations = "dynamic"
    rounding: Rounding = "compensated"
    scales: Scales = "least_error"
    smoothing: float = 0.0
    bias_correction: bool = False
    keep: tuple[str, ...] = ()
    extra_bytes: float = 0.0

    def __post_init__(self) -> None:
        choices = (
            ("weights", WeightScaling),
            ("activations", Activations),
            ("rounding", Rounding),
            ("scales", Scales),
        )
        for name, literal in choices:
            if getattr(self, name) not in get_args(literal):
                raise BuildError(f"recipe: {name} is {getattr(self, name)!r}; one of {', '.join(get_args(literal))}")
        if not 0 <= self.smoothing <= 1:
            raise BuildError(f"recipe: smoothing is {self.smoothing}, must lie between 0 and 1")
        if not 0 <= self.extra_bytes <= 1:
            raise BuildError(f"recipe: extra_bytes is {self.extra_bytes}, must lie between 0 and 1")
        if any(not pattern for pattern in self.keep):
            raise BuildError("recipe: keep has an empty pattern")

    def precision_of(self, module: str) -> Precision:
        """What a module, by its Hugging Face name without `.weight`, is stored and multiplied in."""
        # Embedding, head and norms are not among these.
        is_linear = any(fnmatchcase(module, f"model.layers.*.{pattern}") for pattern in LINEAR_MODULES)
        is_kept = any(fnmatchcase(module, pattern) for pattern in self.keep)
        return "fp8" if is_linear and not is_kept else "network"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the manifest stores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; an unknown key is an error."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise BuildError(f"recipe: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**plain)


RECIPES: dict[str, Recipe] = {
    # Of those that keep no layer, the nearest to the float model (benchmarks/results/fp8-quality.md).
    "default": Recipe(bias_correction=True),
    "mixed": Recipe(extra_bytes=0.1),  # more tokens agree, less divergence, a tenth larger
    "static": Recipe(activations="static"),  # no reduction over each token at run time
    "nearest": Recipe(activations="static", rounding="nearest", scales="max"),  # no compensation: built in seconds
    "nearest-per-tensor": Recipe("per_tensor", "static", "nearest", "max"),
}


def recipe_named(name: str) -> Recipe:
    """One of `RECIPES`.

    Raises:
        BuildError: there is no such recipe.
    """
    if name not in RECIPES:
        raise BuildError(f"recipe is {name!r}; one of {', '.join(RECIPES)}")
    return RECIPES[name]
