"""The fused head loss is cross-entropy of the logits, value and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from famc.work.loss import ROWS, head_loss


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 7])
def test_loss_and_gradients_equal_cross_entropy(rows: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (rows,))
    expected = functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    wanted = torch.autograd.grad(3.0 * expected, (hidden, weight))
    found = head_loss(hidden, weight, labels, bf16=False)
    got = torch.autograd.grad(3.0 * found, (hidden, weight))
    assert torch.allclose(found.double(), expected, rtol=1e-5)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_stays_near_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(100, 32)
    labels = torch.randint(0, 100, (64,))
    exact = head_loss(hidden, weight, labels, bf16=False)
    rounded = head_loss(hidden, weight, labels, bf16=True)
    assert 0 < abs(float(exact - rounded)) / float(exact) < 0.01
