"""Losses over lists. In: scores, labels and which of them are, each [queries, list]. Out: a loss a query.

Labels are relevance, or with `margin_mse` and `kl` a teacher's scores; the positive stands first. Numbers are those of
sentence-transformers' cross-encoder losses on lists of equal length. Those average over the pairs of a batch, these
over the pairs of a query: then a query's loss does not depend on the others, nor a step on how it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
MU = 10.0  # of NDCG-Loss2++ (Wang et al. 2018, LambdaLoss, section 4.4): the weight of NDCG-Loss2 beside LambdaRank


def bce(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Each pair by itself."""
    losses = binary_cross_entropy_with_logits(scores, labels, reduction="none")
    return _mean(losses, mask)


def ranknet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Of every two passages the better one first (Burges et al. 2005), in bits."""
    better = _better(labels, mask)
    return _mean(_wrong(scores), better)


def lambda_loss(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """RankNet weighted by what a swap changes in NDCG: NDCG-Loss2++ of LambdaLoss (Wang et al. 2018)."""
    order = scores.detach().masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    scores, labels, mask = (part.gather(1, order) for part in (scores, labels, mask))
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    gains = torch.where(mask, 2.0 ** labels.clamp(min=0) - 1.0, 0.0)
    discounts = torch.log2(1.0 + ranks)
    best = (gains.sort(dim=-1, descending=True).values / discounts).sum(dim=-1, keepdim=True).clamp(min=1e-10)
    gains = gains / best
    apart = (ranks[:, None] - ranks[None, :]).abs()
    second = (1.0 / torch.log2(1.0 + apart.clamp(min=1)) - 1.0 / torch.log2(2.0 + apart)).abs()
    swap = (1.0 / discounts[:, None] - 1.0 / discounts[None, :]).abs()
    weights = (MU * second + swap) * (gains[:, :, None] - gains[:, None, :]).abs()
    return _mean(weights * _wrong(scores), _better(labels, mask))


def listnet(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the list's softmax to that of the labels (Cao et al. 2007, top one)."""
    wanted = _log_softmax(labels, mask).exp()
    return -torch.where(mask, wanted * _log_softmax(scores, mask), 0.0).sum(dim=-1)


def plistmle(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Likelihood of the list's order, the first places weighing most: 2^(n - rank) - 1 (Lan et al. 2014). The list
    comes best first: the positive, then negatives as they were mined, hardest first.
    """
    rest = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    rest = rest.flip(1).logcumsumexp(dim=1).flip(1)
    count, ranks = mask.sum(dim=1, keepdim=True), torch.arange(1, scores.shape[1] + 1, device=scores.device)
    scale = (count - 127).clamp_min(0)  # fp32 ends at 2^127
    weights = torch.where(mask, 2.0 ** (count - ranks - scale) - 2.0**-scale, 0.0)
    weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-10)
    return -torch.where(mask, (scores - rest) * weights, 0.0).sum(dim=-1)


def margin_mse(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The teacher's distance between the positive and each negative (Hofstätter et al. 2020)."""
    margins = (scores[:, :1] - scores) - (labels[:, :1] - labels)
    negatives = mask.clone()
    negatives[:, 0] = False
    return _mean(margins.square(), negatives)


def kl(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """KL divergence from the teacher's softmax over the list."""
    wanted = _log_softmax(labels, mask)
    return torch.where(mask, wanted.exp() * (wanted - _log_softmax(scores, mask)), 0.0).sum(dim=-1)


LOSSES: dict[str, Loss] = {
    "bce": bce, "ranknet": ranknet, "lambda": lambda_loss, "listnet": listnet, "plistmle": plistmle,
    "margin_mse": margin_mse, "kl": kl,
}  # fmt: skip


def _better(labels: Tensor, mask: Tensor) -> Tensor:
    """[queries, list, list]: where the first is more relevant than the second."""
    return (labels[:, :, None] > labels[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def _wrong(scores: Tensor) -> Tensor:
    """Bits that the scores of two passages pay for the first one's being the better."""
    return -logsigmoid(scores[:, :, None] - scores[:, None, :]) / math.log(2)


def _mean(losses: Tensor, counted: Tensor) -> Tensor:
    """The mean of what counts, by query."""
    losses, counted = losses.flatten(1), counted.flatten(1)
    return torch.where(counted, losses, 0.0).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def _log_softmax(values: Tensor, mask: Tensor) -> Tensor:
    """Over what is there; 0 elsewhere."""
    found = values.masked_fill(~mask, torch.finfo(values.dtype).min).log_softmax(dim=-1)
    return torch.where(mask, found, 0.0)
