"""Recipe: which modules become FP8, and how their scales and codes are chosen.

A recipe is frozen data; `quantizer.py` applies it. benchmarks/fp8_quality.py compares the named recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.decoder.architectures import LINEAR_MODULES
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts

Precision = Literal["fp8", "network"]
WeightScaling = Literal["per_channel", "per_tensor", "per_block"]
Activations = Literal["static", "dynamic"]
Rounding = Literal["nearest", "compensated", "stored"]
Scales = Literal["max", "least_error", "least_weight_error", "stored"]


@dataclass(frozen=True)
class Recipe:
    """How a decoder is converted to FP8.

    weights: one scale for each output channel, or one for the tensor. per_block: those of an FP8 checkpoint, for 128
        input channels of an output channel each; with `stored` alone.
    activations: static: one scale for each tensor, from calibration. dynamic: one scale for each token, computed at run
        time; a token with very large activations, as every language model has, doesn't coarsen the others.
    rounding: nearest: each weight becomes its nearest code. compensated: the channels after a rounded input channel
        absorb its error (GPTQ), measured on the calibration's inputs. stored: the codes of an FP8 checkpoint.
    scales: max: by the largest magnitude. least_error: by the least squared error of the layer's output.
        least_weight_error: by that of the weights themselves, which needs no calibration. stored: those of an FP8
        checkpoint, for activations too.
    smoothing: SmoothQuant's exponent: the share of the activations' spread that moves into the weights; 0: none.
    bias_correction: add to the bias what rounding takes from the mean output.
    keep: patterns of module names (`*` matches any characters) that keep the network's precision.
    extra_bytes: the fraction by which the artefact may grow so that its most sensitive layers keep the network's
        precision.
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
        if self.weights == "per_block" and self.rounding != "stored":
            raise BuildError("recipe: weights per_block are those of an FP8 checkpoint, with rounding stored alone")
        if not 0 <= self.smoothing <= 1:
            raise BuildError(f"recipe: smoothing is {self.smoothing}, must lie between 0 and 1")
        if not 0 <= self.extra_bytes <= 1:
            raise BuildError(f"recipe: extra_bytes is {self.extra_bytes}, must lie between 0 and 1")
        if any(not pattern for pattern in self.keep):
            raise BuildError("recipe: keep has an empty pattern")

    def precision_of(self, module: str) -> Precision:
        """The precision of a module's weight and product; `module` is its Hugging Face name without `.weight`."""
        # Embedding, head and norms are not among LINEAR_MODULES.
        is_linear = any(fnmatchcase(module, f"model.layers.*.{pattern}") for pattern in LINEAR_MODULES)
        is_kept = any(fnmatchcase(module, pattern) for pattern in self.keep)
        return "fp8" if is_linear and not is_kept else "network"

    def corrects(self, module: str) -> bool:
        """Whether a module's bias is corrected; experts have none, so that a step needs no more kernels for them."""
        is_expert = any(fnmatchcase(module, f"model.layers.*.{pattern}") for pattern in MixtureOfExperts.LINEARS)
        return self.bias_correction and not is_expert

    @property
    def needs_calibration(self) -> bool:
        """Whether its numbers depend on the layers' inputs."""
        return self.rounding != "stored" and (
            self.activations == "static"
            or self.rounding == "compensated"
            or self.scales == "least_error"
            or self.smoothing > 0
            or self.bias_correction
            or self.extra_bytes > 0
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the manifest stores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`.

        Raises:
            BuildError: a key is unknown, or a value isn't allowed.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise BuildError(f"recipe: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**plain)


DEFAULT_RECIPE = "default"
RECIPES: dict[str, Recipe] = {
    # The closest to the float model among recipes that keep no layer (benchmarks/results/fp8-quality.md).
    "default": Recipe(bias_correction=True),
    "mixed": Recipe(extra_bytes=0.1),  # higher agreement and lower KL divergence, a tenth larger
    # From the weights alone: no calibration, one pass over the checkpoint.
    "fast": Recipe(rounding="nearest", scales="least_weight_error"),
    "static": Recipe(activations="static"),  # saves the maximum over each token at run time
    "nearest": Recipe(activations="static", rounding="nearest", scales="max"),  # fast to build: no compensation
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
