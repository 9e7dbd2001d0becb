"""Floating-point operations of a pass. A multiply-add is 2; element-wise work is not counted.

`tokens` are tokens of text. A decoder reads each once, an encoder too. T5 splits a text in what its encoder
reads and what its decoder writes: see `ENCODER_SHARE`.
"""

from __future__ import annotations

from famc.cost.parameters import attention, feed_forward, matrices
from famc.cost.shape import DECODERS, ENCODER_DECODERS, Shape

ENCODER_SHARE, DECODER_SHARE = 0.9, 0.2
"""Of a text's tokens, in T5: span corruption takes 15 % of them out in spans of 3 (Raffel et al. 2019,
arXiv:1910.10683, section 3.1.4). The encoder reads the other 85 % and a mark for each span, 5 %; the decoder
writes the marks and what was taken out: 512 tokens in, 114 out. Conversations are taken for the same
(assumed)."""
LOCAL_ATTENTION, GLOBAL_EVERY = 129, 3
"""ModernBERT: 64 tokens to each side and the token itself; every third block attends to all of them."""


def forward(shape: Shape, tokens: float, context: int, causal: bool = True) -> float:
    """2 x (active matmul weights) x tokens + attention; the head counts, the embedding look-up does not.

    Attention: scores and weighted sum, 4 x heads x head_dim x context for each token and layer, halved where
    causal (Kaplan et al. 2020, arXiv:2001.08361, table 1; Narayanan et al. 2021, arXiv:2104.04473, appendix).
    Encoders never are. `context` is the length a sequence has, not the most the model can take.
    """
    matmul = 2.0 * _block_weights(shape) * tokens
    return matmul + head(shape, tokens) + tokens * _attention_core(shape, context, causal)


def head(shape: Shape, tokens: float) -> float:
    """FLOPs of the logits: of every token, in T5 of those that the decoder writes."""
    written = DECODER_SHARE if shape.arch in ENCODER_DECODERS else 1.0
    return 2.0 * tokens * written * shape.vocab * shape.hidden


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
        return forward(shape, tokens, context, causal) - head(shape, tokens)
    raise ValueError(f"recompute is {recompute!r}: it must be none, selective or full")


def _block_weights(shape: Shape) -> float:
    """Weights of the blocks' matrices that a token of text is multiplied with. In T5 the second attention's
    queries and output belong to the decoder's tokens, its keys and values to the encoder's."""
    if shape.arch not in ENCODER_DECODERS:
        return matrices(shape, active=True)
    one = attention(shape) + feed_forward(shape)
    return shape.layers * (ENCODER_SHARE + DECODER_SHARE) * (one + attention(shape) / 2)


def _attention_core(shape: Shape, context: int, causal: bool) -> float:
    """Scores and weighted sums of a token of text. A window counts as wide as it is, as with flash attention;
    kernels that only mask it work as for the whole context."""
    pair = 4.0 * shape.heads * shape.head_dim
    if shape.arch in DECODERS:
        return shape.layers * pair * context * (0.5 if causal else 1.0)
    if shape.arch == "modernbert":
        full = -(-shape.layers // GLOBAL_EVERY)
        return pair * (full * context + (shape.layers - full) * min(context, LOCAL_ATTENTION))
    if shape.arch in ENCODER_DECODERS:
        read, written = ENCODER_SHARE * context, DECODER_SHARE * context
        own = ENCODER_SHARE * read + DECODER_SHARE * written * (0.5 if causal else 1.0)
        return shape.layers * pair * (own + DECODER_SHARE * read)
    return shape.layers * pair * context
