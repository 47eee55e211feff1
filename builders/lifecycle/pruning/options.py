"""What `prune` is told, and the table of its methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError

CHANNELS, HEADS, LAYERS, EXPERTS = "ffn", "heads", "layers", "experts"
# Method → what it can remove; the first is the default.
METHODS: dict[str, tuple[str, ...]] = {
    "l1": (CHANNELS, HEADS, LAYERS),
    "activation": (CHANNELS, HEADS, LAYERS),
    "depth": (LAYERS,),
    "experts": (EXPERTS,),
}
NEEDS_TEXT = ("activation", "depth", "experts")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What is left of each kind is a multiple of this: FP8 kernels cut a matrix into blocks of 64 or 128.
MULTIPLES = {CHANNELS: 64, HEADS: 1, LAYERS: 1, EXPERTS: 1}


@dataclass(frozen=True)
class PruneOptions:
    """What to remove from a checkpoint.

    ratio: the share of channels, heads, layers or experts that is removed. what: one of the method's kinds; None: its
    first. text: UTF-8 file that activations are measured on; None: the built-in texts. multiple_of: of what is left;
    None: the kind's own. dtype: of the weights that are written; None: the checkpoint's. is_refitted: the matrix
    that reads the removed channels is fitted anew, so that the others make up for them.

    Raises:
        BuildError: a value out of range, or two that don't belong together.
    """

    checkpoint: Path
    output: Path
    ratio: float = 0.2
    method: str = "activation"
    what: str | None = None
    text: Path | None = None
    multiple_of: int | None = None
    dtype: str | None = None
    is_refitted: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and 0 < self.ratio < 1):
            raise BuildError(f"ratio is {self.ratio}, must lie between 0 and 1, as 0.2 for a fifth")
        if self.method not in METHODS:
            raise BuildError(f"method is {self.method!r}, must be one of {', '.join(METHODS)}")
        if self.what is not None and self.what not in METHODS[self.method]:
            raise BuildError(
                f"method {self.method} removes {' or '.join(METHODS[self.method])}, not {self.what}; "
                "leave --what out, or choose another --method"
            )
        if self.multiple_of is not None and self.multiple_of < 1:
            raise BuildError(f"multiple-of is {self.multiple_of}, must be at least 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise BuildError(f"dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}")
        if self.is_refitted and (self.method != "activation" or self.kind == LAYERS):
            raise BuildError("refit is for method activation, which knows what the removed channels gave")
        if self.text is not None and self.method not in NEEDS_TEXT:
            raise BuildError(f"method {self.method} looks at the weights alone and reads no text; leave --text out")

    @property
    def kind(self) -> str:
        """What is removed."""
        return self.what or METHODS[self.method][0]

    @property
    def multiple(self) -> int:
        """Of which what is left is a multiple."""
        return self.multiple_of or MULTIPLES[self.kind]

    def at(self, checkpoint: Path) -> PruneOptions:
        """The same for the checkpoint where it lies here."""
        return replace(self, checkpoint=checkpoint)

    def settings(self) -> dict[str, Any]:
        """What the provenance records."""
        return {
            "ratio": self.ratio,
            "method": self.method,
            "what": self.kind,
            "multiple_of": self.multiple,
            "refit": self.is_refitted,
        }


def num_left(total: int, ratio: float, multiple: int, noun: str) -> int:
    """How many of `total` are left: the multiple nearest to 1 - ratio of them, and fewer than all.

    Raises:
        BuildError: so few or so many that nothing, or everything, would be removed.
    """
    left = math.floor(total * (1 - ratio) / multiple + 0.5) * multiple
    if left >= total:
        raise BuildError(
            f"ratio {ratio:g} of {total} {noun} removes none, with what is left a multiple of {multiple}; "
            "raise --ratio or lower --multiple-of"
        )
    if left < 1:
        raise BuildError(
            f"ratio {ratio:g} of {total} {noun} leaves none, with what is left a multiple of {multiple}; "
            "lower --ratio or --multiple-of"
        )
    return left
