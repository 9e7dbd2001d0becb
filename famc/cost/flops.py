"""Floating-point operations of a pass. A multiply-add is 2; element-wise work is not counted."""

from __future__ import annotations

from famc.cost.parameters import attention, feed_forward
from famc.cost.shape import Shape


def forward(shape: Shape, tokens: float, context: int, causal: bool = True) -> float:
    """2 x (active matmul weights) x tokens + attention; the head counts, the embedding look-up does not.

    Attention: scores and weighted sum, 4 x heads x head_dim x context for each token and layer, halved where
    causal (Kaplan et al. 2020, arXiv:2001.08361, table 1; Narayanan et al. 2021, arXiv:2104.04473, appendix).
    `context` is the length a sequence has, not the most the model can take.
    """
    matmul = shape.layers * (attention(shape) + feed_forward(shape, active=True)) + shape.vocab * shape.hidden
    return tokens * (2.0 * matmul + _attention_core(shape, context, causal))


def training(
    shape: Shape,
    tokens: float,
    context: int,
    causal: bool = True,
    recompute: str = "none",
    trainable: float = 1.0,
) -> float:
    """forward x (2 + trainable): one forward, one pass for the gradients of inputs, one for those of weights.

    `trainable` is the trained share of the weights: 1 for full training (3 x forward), ~0 for LoRA (2 x
    forward: frozen weights still pass gradients on). `recompute`: `full` runs each block's forward again,
    `selective` only attention's core (Korthikanti et al. 2022, arXiv:2205.05198, section 5).
    """
    once = forward(shape, tokens, context, causal)
    return once * (2.0 + trainable) + recomputed(shape, tokens, context, causal, recompute)


def recomputed(
    shape: Shape, tokens: float, context: int, causal: bool = True, recompute: str = "none"
) -> float:
    """The FLOPs that recomputation adds to a training pass: hardware work that is not model work."""
    if recompute == "none":
        return 0.0
    if recompute == "selective":
        return tokens * _attention_core(shape, context, causal)
    if recompute == "full":
        return forward(shape, tokens, context, causal) - 2.0 * tokens * shape.vocab * shape.hidden
    raise ValueError(f"recompute is {recompute!r}: it must be none, selective or full")


def _attention_core(shape: Shape, context: int, causal: bool) -> float:
    return shape.layers * 4.0 * shape.heads * shape.head_dim * context * (0.5 if causal else 1.0)
