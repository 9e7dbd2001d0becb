"""Decoders: one description for all of them, and the blocks that follow from it.

In: a Text (what `hf_decoders` reads in a config.json, or a row of the published models). Out: its Anatomy. Architectures
differ in these fields and in nothing else that counts. Bears no identity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from famc.cost.anatomy import Anatomy, Attention, Block, Linear, Stack, Table
from famc.cost.sums import parameters

Task = Literal["lm", "base", "classes"]
"""What stands above the last block: the output head, nothing, or a score for each of some labels."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Sparse feed-forward: `active` of `experts` experts a token, each `ffn` wide; beside them one of `shared` width that
    all tokens meet, with a gate of one number in Qwen2-MoE. `bias`: of router and experts (gpt-oss)."""

    experts: int
    active: int
    ffn: int
    shared: int = 0
    shared_gate: bool = False
    bias: bool = False
    shared_bias: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.experts:
            raise ValueError(f"{self.active} active experts of {self.experts}: active must lie in 1..experts")


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): queries and keys of `nope` + `rope` numbers,
    values of `v`; the cache holds `kv_rank` + `rope` a token. `q_rank` None: queries are not compressed."""

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    v: int


@dataclass(frozen=True, slots=True)
class Text:
    """A decoder. `norm`: weights a channel of a norm: 1 (RMSNorm), 2 (LayerNorm) or 0 (without weights). `windows`: of each
    layer, empty where none has one. `dense`: layers without the mixture, `ffn` wide. `positions`: rows of learnt positions.
    `qk_norm`: one for all heads of a layer (`head`), or as wide as queries and keys together (`all`)."""

    name: str
    vocab: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    tie: bool
    gated: bool = True
    norm: int = 1
    norms: int = 2  # in a block
    final_norm: bool = True
    embed_norm: bool = False  # BLOOM
    qk_norm: Literal["", "head", "all"] = ""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False  # Phi, GPT-J
    fused_qkv: bool = False
    fused_gate: bool = False
    rope: bool = True
    parallel: bool = False
    causal: bool = True
    flash: bool = True
    extra: int = 0  # weights of a block in no matrix or norm: gpt-oss' sinks, xIELU's two numbers
    positions: int = 0
    embed_width: int = 0  # of the table of tokens where it is not `hidden`: OPT-350M
    windows: tuple[int | None, ...] = ()
    moe: Mixture | None = None
    dense: frozenset[int] = frozenset()
    mla: Latent | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.name}: {self.heads} heads cannot share {self.kv_heads} key/value heads evenly"
            )


def decoder(text: Text, task: Task = "lm", labels: int = 0) -> Anatomy:
    """The anatomy of a decoder: part `text`. With `task` classes a score of `labels` numbers stands for the head."""
    h, width = text.hidden, text.embed_width or text.hidden
    windows = text.windows or (None,) * text.layers
    sparse = [text.moe is not None and i not in text.dense for i in range(text.layers)]
    tables = [Table("tokens", text.vocab, width, head=task == "lm" and text.tie)]
    if text.positions:
        tables.append(Table("positions", text.positions, h))
    linears: tuple[Linear, ...] = ()
    if width != h:
        linears = (
            Linear("project_in", width, h, split="none"),
            Linear("project_out", h, width, split="none"),
        )
    vectors = text.norm * h * (text.final_norm + text.embed_norm)
    head = None
    if task == "classes":
        head = Linear("score", width, labels, split="none")
    elif task == "lm" and not text.tie:
        head = Linear("head", width, text.vocab, text.head_bias)
    elif task == "lm" and text.head_bias:
        vectors += text.vocab
    return total(
        "text",
        Anatomy(
            text.name,
            tuple(
                Stack("text", n, _block(text, *kind))
                for kind, n in Counter(zip(windows, sparse, strict=True)).items()
            ),
            tuple(tables),
            linears,
            head,
            text.vocab if task == "lm" else 0,
            vectors,
        ),
    )


def total(part: str, anatomy: Anatomy) -> Anatomy:
    """The same with all its weights booked on one part."""
    return replace(anatomy, parts=((part, parameters(anatomy)),))


def merged(name: str, *models: Anatomy) -> Anatomy:
    """Models side by side as one; the last of them has the output head, if any."""
    last = models[-1]
    return Anatomy(
        name,
        tuple(s for m in models for s in m.stacks),
        tuple(t for m in models for t in m.tables),
        tuple(linear for m in models for linear in m.linears),
        last.head,
        last.vocab,
        sum(m.vectors for m in models),
        tuple(part for m in models for part in m.parts),
        last.head_share,
    )


def stacked(part: str, blocks: Iterable[Block], **more: object) -> tuple[Stack, ...]:
    """Alike blocks gathered into a stack each, in the order in which they first appear. `more`: fields of Stack."""
    return tuple(Stack(part, n, block, **more) for block, n in Counter(blocks).items())  # type: ignore[arg-type]


def experts(hidden: int, moe: Mixture) -> tuple[Linear, ...]:
    """The linear layers of a sparse feed-forward: router, experts, the shared one and its gate."""
    n, k, b = moe.experts, moe.active, moe.bias
    found = [
        Linear("router", hidden, n, b, split="none"),
        Linear("gate", hidden, moe.ffn, b, n, k),
        Linear("up", hidden, moe.ffn, b, n, k),
        Linear("down", moe.ffn, hidden, b, n, k, split="row"),
    ]
    if moe.shared:
        found += [
            Linear("shared_gate", hidden, moe.shared, moe.shared_bias),
            Linear("shared_up", hidden, moe.shared, moe.shared_bias),
            Linear("shared_down", moe.shared, hidden, moe.shared_bias, split="row"),
        ]
    if moe.shared_gate:
        found.append(Linear("shared_expert_gate", hidden, 1, split="none"))
    return tuple(found)


def feed_forward(
    hidden: int, ffn: int, *, gated: bool, bias: bool, fused: bool = False
) -> tuple[Linear, ...]:
    """Two matrices, or three with a gate; gate and value in one where they are fused."""
    down = Linear("down", ffn, hidden, bias, split="row")
    if gated and fused:
        return Linear("gate_up", hidden, 2 * ffn, bias), down
    up = Linear("up", hidden, ffn, bias)
    return (Linear("gate", hidden, ffn, bias), up, down) if gated else (up, down)


def projections(
    hidden: int, q: int, kv: int, *, bias: bool, o_bias: bool, fused: bool = False
) -> tuple[Linear, ...]:
    """Queries, keys, values and output; the first three in one matrix where they are fused."""
    out = Linear("o", q, hidden, o_bias, split="row")
    if fused:
        return Linear("qkv", hidden, q + 2 * kv, bias), out
    return Linear("q", hidden, q, bias), Linear("k", hidden, kv, bias), Linear("v", hidden, kv, bias), out


def _block(text: Text, window: int | None, sparse: bool) -> Block:
    h, d = text.hidden, text.head_dim
    q, kv = text.heads * d, text.kv_heads * d
    vectors = text.norms * text.norm * h + text.extra
    vectors += {"": 0, "head": 2 * d, "all": q + kv}[text.qk_norm]
    if text.mla is not None:
        inside, core, more = _latent(text, text.mla, window)
        vectors += more
    else:
        inside = projections(h, q, kv, bias=text.qkv_bias, o_bias=text.o_bias, fused=text.fused_qkv)
        core = Attention(text.heads, text.kv_heads, d, d, text.causal, window, flash=text.flash)
    feed = (
        experts(h, text.moe)
        if text.moe is not None and sparse
        else feed_forward(h, text.ffn, gated=text.gated, bias=text.mlp_bias, fused=text.fused_gate)
    )
    return Block(
        h,
        (*inside, *feed),
        (core,),
        vectors,
        text.norms,
        bool(text.qk_norm),
        text.rope,
        text.gated,
        text.parallel,
    )


def _latent(text: Text, mla: Latent, window: int | None) -> tuple[tuple[Linear, ...], Attention, int]:
    """Projections, core and norms of latent attention. What makes the latents is small and stands whole on every rank of
    tensor parallelism; what unfolds them into heads is divided."""
    h, n, dim = text.hidden, text.heads, mla.nope + mla.rope
    if mla.q_rank is None:
        queries: tuple[Linear, ...] = (Linear("q", h, n * dim),)
    else:
        queries = (
            Linear("q_a", h, mla.q_rank, text.qkv_bias, split="none"),
            Linear("q_b", mla.q_rank, n * dim),
        )
    rest = (
        Linear("kv_a", h, mla.kv_rank + mla.rope, text.qkv_bias, split="none"),
        Linear("kv_b", mla.kv_rank, n * (mla.nope + mla.v)),
        Linear("o", n * mla.v, h, text.o_bias, split="row"),
    )
    core = Attention(n, n, dim, mla.v, text.causal, window, cached=mla.kv_rank + mla.rope)
    return (*queries, *rest), core, (mla.q_rank or 0) + mla.kv_rank
