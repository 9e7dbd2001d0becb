"""Exact parameter counts, from the weight shapes of the transformers implementations of each architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from famc.cost.shape import Shape


@dataclass(frozen=True, slots=True)
class Parameters:
    """`total` weights; `active` ones a token meets (experts it is not routed to left out); `embedding`: the
    input table, plus the output head where it is not tied."""

    total: int
    active: int
    embedding: int


def attention(shape: Shape) -> int:
    """Q, K, V and O of one layer: hidden x head_dim x (2 heads + 2 kv_heads). No biases."""
    return 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)


def feed_forward(shape: Shape, *, active: bool = False) -> int:
    """SwiGLU of one layer: 3 x hidden x ffn; in a mixture that for each (active) expert, plus the router."""
    if shape.moe is None:
        return 3 * shape.hidden * shape.ffn
    experts = shape.moe.active if active else shape.moe.experts
    return 3 * shape.hidden * shape.moe.ffn * experts + shape.hidden * shape.moe.experts


def layer(shape: Shape, *, active: bool = False) -> int:
    """One block: attention, feed-forward, two RMSNorms; Qwen3 also norms queries and keys (2 x head_dim)."""
    norms = 2 * shape.hidden + (0 if shape.arch == "llama" else 2 * shape.head_dim)
    return attention(shape) + feed_forward(shape, active=active) + norms


@lru_cache(maxsize=4096)
def count(shape: Shape) -> Parameters:
    """layers x block + final norm + embedding (+ untied head): what transformers counts."""
    embedding = shape.vocab * shape.hidden * (1 if shape.tie else 2)
    rest = shape.hidden + embedding
    return Parameters(
        total=shape.layers * layer(shape) + rest,
        active=shape.layers * layer(shape, active=True) + rest,
        embedding=embedding,
    )


def lora(shape: Shape, rank: int) -> int:
    """Adapters on all linear layers of the blocks: rank x (in + out) each (Hu et al., arXiv:2106.09685)."""
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    experts, ffn = (shape.moe.experts, shape.moe.ffn) if shape.moe else (1, shape.ffn)
    return shape.layers * rank * (2 * (h + q) + 2 * (h + kv) + experts * 3 * (h + ffn))
