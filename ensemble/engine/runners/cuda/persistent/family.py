"""What a family of decoders tells of its persistent kernel. It knows no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.persistent.memory import MIN_STAGES, WARPS, Memory

if TYPE_CHECKING:
    import torch

    from deepseek_triton.ensemble.engine.runners.cuda.layers import Layer
    from deepseek_triton.ensemble.engine.runners.cuda.linear import DeviceLinear

SOURCES = Path(__file__).parents[1] / "kernels" / "persistent"
INSTRUCTIONS = "instructions.cu"


@dataclass(frozen=True)
class Family(ABC):
    """A decoder that one source of kernels/persistent/ computes.

    Args:
        shape: the decoder's, of a model on several GPUs this rank's part.
        is_fp8: whether its layers' matrices are E4M3 codes.
        blocks: of the grid, one a multiprocessor.
        shared_limit: bytes of shared memory that a block may have.
    """

    shape: DecoderShape
    is_fp8: bool
    blocks: int
    shared_limit: int

    SOURCE: ClassVar[str]

    def reason_against(self, num_ranks: int) -> str | None:
        """Why the kernel can't run this decoder on so many GPUs; None: it can."""
        if reason := self.own_reason_against(num_ranks):
            return reason
        if self.shape.hidden_size > 32 * WARPS * self.blocks:
            return f"hidden_size {self.shape.hidden_size} is more than {32 * WARPS * self.blocks}"
        if self.shape.hidden_size < self.blocks:
            return f"hidden_size {self.shape.hidden_size} is less than a number for each of {self.blocks} blocks"
        if self.memory.stages < MIN_STAGES:
            return "a multiprocessor has too little shared memory"
        return None

    @abstractmethod
    def own_reason_against(self, num_ranks: int) -> str | None:
        """The same, of what only this source asks for."""

    @property
    @abstractmethod
    def memory(self) -> Memory:
        """A block's shared memory."""

    @property
    @abstractmethod
    def macros(self) -> dict[str, object]:
        """Those that only this source has."""

    @property
    @abstractmethod
    def work_bytes(self) -> int:
        """Of the source's `Work`, or a little more."""

    def source(self, instructions: str) -> str:
        """The text to compile, whose first part is `instructions`."""
        return "\n".join([instructions, *((SOURCES / name).read_text("utf-8") for name in ("common.cu", self.SOURCE))])

    def all_macros(self, *, vocab: int, extent: int, page: int, rank: int = 0, num_ranks: int = 1) -> dict[str, object]:
        """What the source is compiled for; vocab: rows of the head; extent and page: of the caches."""
        shape = self.shape
        return {
            "HIDDEN": shape.hidden_size, "VOCAB": vocab, "LAYERS": shape.num_layers, "MAX_SEQ_LEN": extent,
            "PAGE": page, "RANK": rank, "RANKS": num_ranks, "FP8": int(self.is_fp8),
            "EPS": f"{shape.rms_norm_eps:.9e}f", "BLOCKS": self.blocks, "WORK_BYTES": self.work_bytes,
            **self.memory.macros, **self.macros,
        }  # fmt: skip

    @abstractmethod
    def tensors(self, layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """What the source's `Layer` points to, in its order; keys and values: the layer's part of the cache."""


def matrix(linear: DeviceLinear) -> tuple[torch.Tensor | None, ...]:
    """What a source's `Matrix` points to."""
    return linear.weight, linear.scale, linear.bias
