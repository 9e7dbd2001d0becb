"""Exact parameter counts, from the weight shapes of the transformers implementations of each architecture.

Decoders with their output head; encoders with the head that fills in masked tokens (`…ForMaskedLM`), which a
fine-tuned embedder or reranker no longer has; T5 with encoder, decoder and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from famc.cost.shape import ENCODERS, Shape

TOKEN_TYPES = 2  # of BERT: first and second text of a pair
DISTANCES = 32  # buckets of T5's relative positions


@dataclass(frozen=True, slots=True)
class Parameters:
    """`total` weights; `active` ones a token meets (experts it is not routed to left out); `embedding`: the
    input table, plus the output head where it is not tied."""

    total: int
    active: int
    embedding: int


def attention(shape: Shape) -> int:
    """Q, K, V and O of one layer: hidden x head_dim x (2 heads + 2 kv_heads). Biases are not in it."""
    return 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)


def feed_forward(shape: Shape, *, active: bool = False) -> int:
    """Gated (SwiGLU, GeGLU) of one layer: 3 x hidden x ffn; in a mixture that for each (active) expert, plus the
    router. BERT has no gate: 2 x hidden x ffn."""
    if shape.moe is None:
        return (2 if shape.arch == "bert" else 3) * shape.hidden * shape.ffn
    experts = shape.moe.active if active else shape.moe.experts
    return 3 * shape.hidden * shape.moe.ffn * experts + shape.hidden * shape.moe.experts


def layer(shape: Shape, *, active: bool = False) -> int:
    """One block: attention, feed-forward, and their norms; of T5 the decoder's, which is the larger one.

    Two RMSNorms; Qwen3 also norms queries and keys (2 x head_dim). BERT's norms and matrices have biases.
    T5's decoder attends a second time, to the encoder, with a norm of its own.
    """
    both = attention(shape) + feed_forward(shape, active=active)
    if shape.arch == "bert":
        return both + 4 * shape.hidden + (shape.ffn + shape.hidden) + 4 * shape.hidden
    if shape.arch == "t5":
        return both + attention(shape) + 3 * shape.hidden
    return both + 2 * shape.hidden + (2 * shape.head_dim if shape.arch in ("qwen3", "qwen3_moe") else 0)


def matrices(shape: Shape, *, active: bool = False) -> int:
    """Weights in the matrices of all blocks, with the dense one before an encoder's output head."""
    one = attention(shape) + feed_forward(shape, active=active)
    if shape.arch == "t5":
        return shape.layers * (2 * one + attention(shape))
    return shape.layers * one + (shape.hidden**2 if shape.arch in ENCODERS else 0)


def blocks(shape: Shape, *, active: bool = False) -> int:
    """All blocks; those of T5's encoder lack the second attention and its norm."""
    all_layers = shape.layers * layer(shape, active=active)
    if shape.arch == "t5":
        return 2 * all_layers - shape.layers * (attention(shape) + shape.hidden)
    return all_layers


def around(shape: Shape) -> int:
    """What stands outside the blocks and is no table of tokens: norms, positions, an encoder's head.

    BERT: positions, token types and a norm below; dense, norm and the vocabulary's bias above. ModernBERT: a
    norm below, and none in the first block; a norm, dense, norm and the vocabulary's bias above. T5: a
    norm after each stack, and a table of distances in each.
    """
    h = shape.hidden
    if shape.arch == "bert":
        return (shape.context + TOKEN_TYPES + 2) * h + h * h + 3 * h + shape.vocab
    if shape.arch == "modernbert":
        return h + h * h + h + shape.vocab
    if shape.arch == "t5":
        return 2 * (h + DISTANCES * shape.heads)
    return h


@lru_cache(maxsize=4096)
def count(shape: Shape) -> Parameters:
    """Blocks + what is around them + embedding (+ untied head): what transformers counts."""
    embedding = shape.vocab * shape.hidden * (1 if shape.tie else 2)
    rest = around(shape) + embedding
    return Parameters(
        total=blocks(shape) + rest,
        active=blocks(shape, active=True) + rest,
        embedding=embedding,
    )


def bare(shape: Shape) -> int:
    """Without the output head: what an embedder keeps."""
    h = shape.hidden
    if shape.arch == "bert":
        return count(shape).total - (h * h + 3 * h + shape.vocab)
    if shape.arch == "modernbert":
        return count(shape).total - (h * h + h + shape.vocab)
    return count(shape).total - (0 if shape.tie else shape.vocab * h)


def ranker(shape: Shape) -> int:
    """With a head of one label in its place: BERT's behind its pooler, ModernBERT's behind a dense matrix and a norm."""
    h = shape.hidden
    if shape.arch == "bert":
        return bare(shape) + h * h + h + h + 1
    if shape.arch == "modernbert":
        return bare(shape) + h * h + h + h + 1
    return bare(shape) + h


def lora(shape: Shape, rank: int) -> int:
    """Adapters on all linear layers but the output head: rank x (in + out) each (Hu et al., arXiv:2106.09685).

    ModernBERT has Q, K and V in one matrix, and gate and value in another: one adapter each. An encoder's
    dense layer before the output head gets one too.
    """
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.arch == "bert":
        return rank * (shape.layers * (4 * 2 * h + 2 * (h + shape.ffn)) + 2 * h)
    if shape.arch == "modernbert":
        return rank * (shape.layers * (4 * h + 2 * h + (h + 2 * shape.ffn) + (shape.ffn + h)) + 2 * h)
    if shape.arch == "t5":
        return rank * shape.layers * (3 * 4 * (h + q) + 2 * 3 * (h + shape.ffn))
    experts, ffn = (shape.moe.experts, shape.moe.ffn) if shape.moe else (1, shape.ffn)
    return shape.layers * rank * (2 * (h + q) + 2 * (h + kv) + experts * 3 * (h + ffn))
