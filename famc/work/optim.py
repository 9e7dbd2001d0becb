"""Optimisers and schedules. In: a model and a step's resolved values. Out: what Trainer steps.

AdamW with decay on matrices only; or Muon (arXiv 2502.16982: orthogonalised momentum, updates scaled to
AdamW's size) on the matrices inside the blocks, with AdamW on stacked experts (decayed, as they are matrices)
and on embeddings, head and vectors (not decayed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

# tables, of which a row is a token, a position or a distance: no matrices that turn one vector into another
# and heads of one row
OUTSIDE = ("embed", "lm_head", "shared", "relative_attention_bias", "score", "classifier")


def make_optimizer(model: torch.nn.Module, params: Mapping[str, Any]) -> Optimizer:
    """The optimiser that a stage's values ask for."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for _, p in trained if p.dim() >= 2]
    vectors = [p for _, p in trained if p.dim() < 2]
    rate, decay, betas = params["lr.peak"], params["weight_decay"], tuple(params["betas"])
    if params["optimizer"] == "adamw":
        return _adamw([(matrices, decay), (vectors, 0.0)], rate, betas)
    inside = [p for name, p in trained if p.dim() == 2 and not any(word in name for word in OUTSIDE)]
    if not inside:
        return _adamw([(matrices, decay), (vectors, 0.0)], rate, betas)
    experts = [p for p in matrices if p.dim() > 2]  # stacked matrices, which torch's Muon does not take
    chosen = {id(p) for p in (*inside, *experts)}
    rest = [p for p in matrices if id(p) not in chosen]
    muon = Muon(
        inside, lr=rate, weight_decay=decay, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    if not (experts or rest or vectors):  # adapters on the blocks only
        return muon
    return Pair(muon, _adamw([(experts, decay), (rest, 0.0), (vectors, 0.0)], rate, betas))


def _adamw(groups: list[tuple[list[torch.nn.Parameter], float]], rate: float, betas: Any) -> AdamW:
    used = [{"params": members, "weight_decay": decay} for members, decay in groups if members]
    return AdamW(used, lr=rate, betas=betas, eps=1e-8, fused=True)


class Pair(Optimizer):
    """Two optimisers that step, save and load as one. They share their groups: one schedule rules both."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.both = (first, second)
        self.defaults: dict[str, Any] = {}
        super().__init__([{"params": group["params"]} for one in self.both for group in one.param_groups], {})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for one in self.both for group in one.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for one in self.both:
            one.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.both:
            one.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"both": [one.state_dict() for one in self.both]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for one, state in zip(self.both, state_dict["both"], strict=True):
            one.load_state_dict(state)
        self._share()


def schedule(params: Mapping[str, Any], steps: int) -> Callable[[int], float]:
    """Share of the peak at a step: linear warm-up, then the schedule's fall to `lr.min_ratio`."""
    kind, low = params["lr.schedule"], params["lr.min_ratio"]
    warm = 0 if kind == "decay" else max(1, round(params["lr.warmup"] * steps))
    decay = max(1, round(params["lr.decay"] * steps))

    def at(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        if kind == "constant":
            return 1.0
        if kind == "cosine":
            return float(low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        if kind == "wsd":
            left = (steps - step) / decay
            return float(low + (1 - low) * min(1.0, max(0.0, left)))
        return float(low + (1 - low) * max(0.0, 1.0 - done))  # linear, decay

    return at
