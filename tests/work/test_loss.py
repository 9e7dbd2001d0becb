"""The fused head loss is what autograd makes of logits: value and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from famc.work.loss import DISTANCES, ROWS, Teacher, head_loss


def make(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(0, 50, (rows,))


def same(found: torch.Tensor, expected: torch.Tensor, *leaves: torch.Tensor) -> None:
    wanted = torch.autograd.grad(3.0 * expected, leaves)
    got = torch.autograd.grad(3.0 * found, leaves)
    assert torch.allclose(found, expected)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 7])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_loss_and_gradients_equal_cross_entropy(rows: int, z_loss: float) -> None:
    hidden, weight, labels = make(rows)
    logits = hidden @ weight.T
    expected = (
        functional.cross_entropy(logits, labels, reduction="sum")
        + z_loss * logits.logsumexp(-1).square().sum()
    )
    same(head_loss(hidden, weight, labels, bf16=False, z_loss=z_loss), expected, hidden, weight)


@pytest.mark.parametrize("kind", sorted(DISTANCES))
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_equals_its_definition(kind: str, temperature: float) -> None:
    hidden, weight, labels = make(ROWS + 3)
    theirs, their_weight = (
        torch.randn(ROWS + 3, 16, dtype=torch.float64),
        torch.randn(50, 16, dtype=torch.float64),
    )
    p = torch.log_softmax(hidden @ weight.T / temperature, -1)
    q = torch.log_softmax(theirs @ their_weight.T / temperature, -1)
    m = torch.log(0.5 * p.exp() + 0.5 * q.exp())

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return functional.kl_div(b, a, log_target=True, reduction="sum")

    distance = {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "jsd": 0.5 * kl(p, m) + 0.5 * kl(q, m)}[kind]
    expected = (
        0.3 * functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
        + 0.7 * temperature**2 * distance
    )
    found = head_loss(
        hidden, weight, labels, bf16=False, teacher=Teacher(theirs, their_weight, kind, 0.7, temperature)
    )
    same(found, expected, hidden, weight)


def test_a_student_that_is_its_teacher_feels_no_pull() -> None:
    hidden, weight, labels = make(8)
    for kind in DISTANCES:
        teacher = Teacher(hidden.detach(), weight.detach(), kind, 1.0, 1.0)
        loss = head_loss(hidden, weight, labels, bf16=False, teacher=teacher)
        assert math.isclose(float(loss), 0.0, abs_tol=1e-9)
        assert float(torch.autograd.grad(loss, hidden)[0].abs().max()) < 1e-9


def test_bf16_stays_near_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(100, 32)
    labels = torch.randint(0, 100, (64,))
    exact = head_loss(hidden, weight, labels, bf16=False)
    rounded = head_loss(hidden, weight, labels, bf16=True)
    assert 0 < abs(float(exact - rounded)) / float(exact) < 0.01
