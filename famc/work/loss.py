"""Next-token loss straight from hidden states: the logits of a batch never exist at once, nor their gradient.

In: hidden states [tokens, hidden], the output head's weight, labels. Out: the summed cross-entropy. Softmax and its gradient
are taken in one go, a slice of rows at a time, so a 150,000-word vocabulary costs 300 MB instead of gigabytes, and on CPUs
the head takes half the time of logits + cross_entropy (torch's own linear_cross_entropy: nine tenths). Equal to them to
rounding: tests/work/test_loss.py.
"""

from __future__ import annotations

from typing import Any

import torch

ROWS = 512  # logits of a slice: 512 x 4,096 fp32 = 8 MB, inside the cache


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        narrow, head = hidden.detach().to(dtype), weight.detach().to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for at in range(0, len(hidden), ROWS):
            part, wanted = narrow[at : at + ROWS], labels[at : at + ROWS, None]
            logits = (part @ head.T).to(wide)
            norm = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (norm - logits.gather(1, wanted)).sum()
            gradient = logits.sub_(norm).exp_()  # softmax …
            gradient.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=gradient.dtype))  # … minus the label
            gradient = gradient.to(dtype)
            grad_hidden[at : at + ROWS] = gradient @ head
            grad_weight += gradient.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * upstream[0], grad_weight * upstream[0], None, None


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, bf16: bool) -> torch.Tensor:
    """Sum of -log softmax(hidden @ weight.T)[label] over rows; with bf16 the products are rounded as autocast does."""
    with torch.autocast(hidden.device.type, enabled=False):
        loss: torch.Tensor = _HeadLoss.apply(hidden, weight, labels, torch.bfloat16 if bf16 else hidden.dtype)  # type: ignore[no-untyped-call]
    return loss
