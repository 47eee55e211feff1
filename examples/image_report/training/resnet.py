"""The ResNet in PyTorch, for training alone: three stages of two basic blocks, 16 to 64 channels."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from deepseek_triton.examples.image_report.findings import FINDINGS

CHANNELS = (16, 32, 64)
BLOCKS_PER_STAGE = 2


class ConvNorm(nn.Sequential):
    """A convolution without a bias, and its batch normalisation."""

    def __init__(self, num_in: int, num_out: int, kernel: int, stride: int) -> None:
        conv = nn.Conv2d(num_in, num_out, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(num_out))

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the one convolution that computes the same once training is over."""
        conv, norm = cast(nn.Conv2d, self[0]), cast(nn.BatchNorm2d, self[1])
        assert norm.running_var is not None and norm.running_mean is not None
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return conv.weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 and the way around them."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(num_in, num_out, 3, stride)
        self.second = ConvNorm(num_out, num_out, 3, 1)
        self.around = ConvNorm(num_in, num_out, 1, stride) if stride > 1 or num_in != num_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, num_in, h, w] → [n, num_out, h / stride, w / stride]."""
        inner = self.second(torch.relu(self.first(x)))
        return torch.relu(inner + (x if self.around is None else self.around(x)))


class ResNet(nn.Module):
    """Pixels [n, 3, h, w] in 0 to 1 → a logit for each finding [n, findings]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, CHANNELS[0], 3, 2)
        blocks: list[BasicBlock] = []
        for stage, num_out in enumerate(CHANNELS):
            for block in range(BLOCKS_PER_STAGE):
                num_in = CHANNELS[max(stage - 1, 0)] if block == 0 else num_out
                blocks.append(BasicBlock(num_in, num_out, 2 if stage and not block else 1))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(CHANNELS[-1], len(FINDINGS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x.mean(dim=(2, 3)))
        return logits
