"""Losses straight from hidden states: the logits of a batch never exist at once, nor does their gradient.

In: hidden states [tokens, hidden], the output head's weight, labels; for distillation the teacher's as well. Out: the sum over
tokens of (1 - alpha) x cross-entropy + z x log(Z)^2 + alpha x T^2 x distance to the teacher. Softmax and its gradient are taken
in one go, a slice of rows at a time, so a 150,000-word vocabulary costs 300 MB instead of gigabytes, and on CPUs the head takes
half the time of logits + cross_entropy (torch's own linear_cross_entropy: nine tenths). tests/work/test_loss.py holds values and
gradients to autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ROWS = 512  # logits of a slice: 512 x 4,096 fp32 = 8 MB, inside the cache
Distance = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Teacher:
    """What a student follows: the teacher's hidden states and head, and how much."""

    hidden: torch.Tensor
    weight: torch.Tensor
    kind: str  # forward_kl | reverse_kl | jsd
    alpha: float
    temperature: float


def forward_kl(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student) of log-probabilities, and its gradient by the student's logits: p - q."""
    wanted = theirs.exp()
    return (wanted * (theirs - mine)).sum(), mine.exp() - wanted


def reverse_kl(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher), and p (log p/q - KL)."""
    own, gap = mine.exp(), mine - theirs
    each = (own * gap).sum(dim=-1, keepdim=True)
    return each.sum(), own * (gap - each)


def jsd(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Jensen–Shannon at 1/2 (GKD, arXiv 2306.13649), and p (g - sum p g) with g = log(p / m) / 2."""
    own, middle = mine.exp(), torch.logaddexp(mine, theirs) - math.log(2.0)
    pull = 0.5 * (mine - middle)
    value = (own * pull).sum() + 0.5 * (theirs.exp() * (theirs - middle)).sum()
    return value, own * (pull - (own * pull).sum(dim=-1, keepdim=True))


DISTANCES: dict[str, Distance] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype,
        z_loss: float, teacher: Teacher | None,
    ) -> torch.Tensor:  # fmt: skip
        narrow, head = hidden.detach().to(dtype), weight.detach().to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        their_head = teacher.weight.to(dtype) if teacher else None
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for at in range(0, len(hidden), ROWS):
            part, wanted = narrow[at : at + ROWS], labels[at : at + ROWS, None]
            logits = (part @ head.T).to(wide)
            norm = torch.logsumexp(logits, dim=-1, keepdim=True)
            share = 1.0 - teacher.alpha if teacher else 1.0
            total += share * (norm - logits.gather(1, wanted)).sum() + z_loss * norm.square().sum()
            pulled = None
            if teacher and their_head is not None:
                heat = teacher.temperature
                mine = logits - norm if heat == 1.0 else torch.log_softmax(logits / heat, dim=-1)
                theirs = torch.log_softmax(
                    (teacher.hidden[at : at + ROWS].to(dtype) @ their_head.T).to(wide) / heat, dim=-1
                )
                value, pulled = DISTANCES[teacher.kind](mine, theirs)
                total += teacher.alpha * heat**2 * value
            gradient = logits.sub_(norm).exp_()  # softmax …
            if z_loss:
                gradient *= share + 2.0 * z_loss * norm
            elif share != 1.0:
                gradient *= share
            gradient.scatter_add_(1, wanted, torch.full_like(wanted, -share, dtype=wide))  # … minus the label
            if teacher and pulled is not None:
                gradient += (teacher.alpha * teacher.temperature) * pulled
            gradient = gradient.to(dtype)
            grad_hidden[at : at + ROWS] = gradient @ head
            grad_weight += gradient.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * upstream[0], grad_weight * upstream[0], None, None, None, None


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bf16: bool,
    z_loss: float = 0.0,
    teacher: Teacher | None = None,
) -> torch.Tensor:
    """The summed loss of rows whose labels all count; with bf16 the products are rounded as autocast does."""
    dtype = torch.bfloat16 if bf16 else hidden.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        loss: torch.Tensor = _HeadLoss.apply(hidden, weight, labels, dtype, z_loss, teacher)  # type: ignore[no-untyped-call]
    return loss
