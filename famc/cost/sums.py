"""Sums over a model's parts: weights, FLOPs, the key-value cache. One formula each, for every architecture.

In: an Anatomy. Out: numbers. A multiply-add is 2 FLOPs; element-wise work is not counted. Bears no identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from famc.cost.anatomy import Anatomy, Attention, Block, Linear, Stack


@lru_cache(maxsize=4096)
def parameters(anatomy: Anatomy) -> int:
    """All weights, each once: a tied head is its table's."""
    return _outside(anatomy) + sum(s.layers * block_weights(s.block) for s in anatomy.stacks)


@lru_cache(maxsize=4096)
def active(anatomy: Anatomy) -> int:
    """Weights without the experts that a token is not routed to. The tables count whole, as in published figures."""
    return _outside(anatomy) + sum(s.layers * block_weights(s.block, active=True) for s in anatomy.stacks)


def block_weights(block: Block, *, active: bool = False) -> int:
    """Weights of one block; `active`: of its experts those that a token meets."""
    return block.vectors + sum(
        linear.weights // linear.copies * linear.active if active else linear.weights
        for linear in block.linears
    )


def matmul_flops(anatomy: Anatomy, tokens: float) -> float:
    """Forward FLOPs of all linear layers and the head for `tokens` tokens of the step's length: 2 x (active weights of
    the matrices) x the tokens that each of them reads. Biases, look-ups and attention's core are not in it (Kaplan et al.
    2020, arXiv:2001.08361, table 1)."""
    return tokens * _matmul_a_token(anatomy)


def attention_flops(anatomy: Anatomy, tokens: float, seq_len: float) -> float:
    """Forward FLOPs of attention's core (scores, weighted sums) for `tokens` tokens in sequences of `seq_len`.

    2 x heads x (qk_dim + v_dim) for each query and key that it sees; a causal query sees half of the sequence
    (Narayanan et al. 2021, arXiv:2104.04473, appendix, without the half; Dao 2023, arXiv:2307.08691, section 4.1).
    """
    return tokens * sum(_core_a_token(stack, seq_len) for stack in anatomy.stacks)


def forward_flops(anatomy: Anatomy, tokens: float, seq_len: float) -> float:
    """Linear layers, head and attention's core: one forward pass."""
    return matmul_flops(anatomy, tokens) + attention_flops(anatomy, tokens, seq_len)


def seen(attention: Attention, queries: float, keys: float) -> float:
    """Keys that one query sees on average, of a sequence of `queries` queries and `keys` keys.

    Causal: half of them. A window of w: w, less the corner at the start where fewer than w precede, w^2 / 2n. (The exact
    mean of a causal sequence is (n + 1) / 2; n / 2 is what the field counts.)
    """
    if attention.cross or not attention.causal:
        return keys if attention.window is None else min(keys, attention.window)
    w = keys if attention.window is None else min(keys, attention.window)
    return w - w * w / (2 * queries) if queries else 0.0


def kv_numbers(attention: Attention) -> int:
    """Numbers that one token leaves in the cache of one layer: keys and values, or what `cached` says (MLA's latent)."""
    if attention.cached is not None:
        return attention.cached
    return attention.kv_heads * (attention.qk_dim + attention.v_dim)


def kv_bytes(anatomy: Anatomy, context: float, width: float = 2.0, source: float = 0.0) -> float:
    """Bytes of the cache of one sequence of `context` tokens: windowed layers keep no more than their window. `source`:
    tokens that the cross attentions look at (T5's input, Whisper's frames)."""
    own = sum(
        s.layers * kv_numbers(a) * (context if a.window is None else min(context, a.window))
        for s in anatomy.stacks
        for a in _cached(s, cross=False)
    )
    other = sum(s.layers * kv_numbers(a) for s in anatomy.stacks for a in _cached(s, cross=True))
    return width * (own + source * other)


def adapters(anatomy: Anatomy, rank: int) -> int:
    """Weights of low-rank adapters on all linear layers but the head: rank x (in + out) each (Hu et al. 2021,
    arXiv:2106.09685); one for each copy of an expert, one for a fused matrix, none for routers and convolutions.
    What peft adds to dense models; experts it finds only where transformers keeps them as linear layers."""
    inside = sum(s.layers * sum(_low_rank(x) for x in s.block.linears) for s in anatomy.stacks)
    return rank * (inside + sum(_low_rank(x) for x in anatomy.linears))


_PLAIN_WEIGHTS = ("router", "patch", "conv1", "conv2")
"""Matrices that peft's `all-linear` doesn't find: they are no linear layers in transformers."""


def with_media(anatomy: Anatomy, seq_len: int, inputs: Mapping[str, float]) -> Anatomy:
    """The anatomy as it works in sequences of `seq_len` tokens with so many images or pieces of audio each:
    `{"vision": 2, "audio": 0.5}`. All stacks of a medium (tower, pool, projector) get their share.

    ValueError for a medium that the model does not read, a negative number, and sequences without tokens.
    """
    if seq_len < 1:
        raise ValueError(f"sequences of {seq_len} tokens: it must be at least 1")
    media = {s.medium for s in anatomy.stacks} - {""}
    for medium, number in inputs.items():
        if medium not in media:
            raise ValueError(
                f"{anatomy.name} reads no {medium}: it reads {', '.join(sorted(media)) or 'text alone'}"
            )
        if number < 0:
            raise ValueError(f"{number} inputs of {medium} a sequence: it must be at least 0")
    rates = {medium: number / seq_len for medium, number in inputs.items()}
    return replace(
        anatomy,
        stacks=tuple(_read(s, rates[s.medium]) if s.medium in rates else s for s in anatomy.stacks),
    )


# --- of one stack -----------------------------------------------------------------------------------------


def _read(stack: Stack, rate: float) -> Stack:
    """The stack with `rate` inputs of its medium for one token of the step's length."""
    return replace(
        stack,
        share=stack.share if stack.length is None else rate * stack.length,
        source=stack.source if stack.source_length is None else rate * stack.source_length,
    )


def _outside(anatomy: Anatomy) -> int:
    head = anatomy.head.weights if anatomy.head else 0
    return (
        anatomy.vectors
        + head
        + sum(t.weights for t in anatomy.tables)
        + sum(linear.weights for linear in anatomy.linears)
    )


def _met(linear: Linear) -> int:
    """Weights of the matrices that one token is multiplied with."""
    return linear.active * linear.fan_in * linear.fan_out


def _low_rank(linear: Linear) -> int:
    return 0 if linear.name in _PLAIN_WEIGHTS else linear.copies * (linear.fan_in + linear.fan_out)


@lru_cache(maxsize=4096)
def _matmul_a_token(anatomy: Anatomy) -> float:
    met = sum(float(_met(linear)) for linear in anatomy.linears)
    for s in anatomy.stacks:
        own = sum(_met(x) for x in s.block.linears if not x.cross)
        other = sum(_met(x) for x in s.block.linears if x.cross)
        met += s.layers * (s.share * own + s.source * other)
    if anatomy.head is not None:
        met += anatomy.head_share * _met(anatomy.head)
    else:
        met += anatomy.head_share * sum(t.weights for t in anatomy.tables if t.head)
    return 2.0 * met


def _core_a_token(stack: Stack, seq_len: float) -> float:
    """FLOPs of the stack's attentions for one token of the step's length."""
    queries = stack.share * seq_len if stack.length is None else float(stack.length)
    source = stack.source * seq_len if stack.source_length is None else float(stack.source_length)
    total = 0.0
    for a in stack.block.attentions:
        pair = 2.0 * a.heads * (a.qk_dim + a.v_dim)
        total += pair * seen(a, queries, source if a.cross else queries)
    return stack.layers * stack.share * total


def _cached(stack: Stack, *, cross: bool) -> tuple[Attention, ...]:
    """Attentions that keep keys and values while a text is generated: those of blocks that look back at it."""
    if not any(a.causal and not a.cross for a in stack.block.attentions):
        return ()
    return tuple(a for a in stack.block.attentions if a.cross == cross)
