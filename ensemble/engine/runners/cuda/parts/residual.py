"""The residual stream between the parts of a decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepseek_triton.ensemble.engine.runners.cuda.linear import Parts


@dataclass
class Residual:
    """The residual stream `hidden` [rows, hidden_size] float32, and what the next norm adds to it first.

    pending: the output of the last part's matrix product, without its `bias` [hidden_size].
    """

    hidden: torch.Tensor
    pending: Parts | None = None
    bias: torch.Tensor | None = None

    def add(self, output: Parts, bias: torch.Tensor | None) -> None:
        """Leave a part's output for the next norm, which must have added the one before."""
        self.pending, self.bias = output, bias
