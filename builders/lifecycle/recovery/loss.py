"""How far a student's predictions are from its teacher's and from the text: in nats a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Means over tokens. objective: what training lowers. kl: KL(teacher ‖ student). agreement: equal first choices."""

    objective: Tensor
    kl: Tensor
    cross_entropy: Tensor
    agreement: Tensor


def distillation(
    student: Tensor, teacher: Tensor, targets: Tensor, *, kl_weight: float, temperature: float = 1.0
) -> Losses:
    """Logits of both [..., vocab_size], and the next token [...] of each position.

    The divergence is that of both distributions at `temperature`, times its square, so that its gradient keeps its
    size (Hinton et al., arXiv 1503.02531).
    """
    import torch
    from torch.nn import functional

    student, teacher, targets = student.flatten(0, -2).float(), teacher.flatten(0, -2).float(), targets.flatten()
    own = functional.log_softmax(student / temperature, -1)
    wanted = functional.log_softmax(teacher / temperature, -1)
    kl = functional.kl_div(own, wanted, log_target=True, reduction="batchmean") * temperature**2
    cross_entropy = functional.cross_entropy(student, targets)
    agreement = (student.argmax(-1) == teacher.argmax(-1)).to(torch.float32).mean()
    return Losses(kl_weight * kl + (1 - kl_weight) * cross_entropy, kl, cross_entropy, agreement)
