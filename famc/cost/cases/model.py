"""The model that a row of a table describes by its dimensions: the columns of benchmarks/data/calibration.csv.

In: a mapping of column names to text. Out: an Anatomy. Bears no identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from famc.cost.anatomy import Anatomy, Attention, Block, Linear, Stack, Table

Row = Mapping[str, str]

NO_BIAS = ("Falcon", "Nemotron")
"""Families whose layer norms have a bias though their matrices have none. MPT's benchmark models have both, though the
column `norm` calls them `ln_nobias`: llm-foundry's own parameter counts say so."""

_SHAPE = (
    "model", "family", "attn", "layers", "hidden", "ffn", "mlp_type", "heads", "kv_heads", "head_dim", "vocab",
    "tied_embeddings", "learned_pos", "norm", "n_experts", "top_k", "n_shared_experts", "moe_ffn", "n_dense_layers",
    "dense_ffn", "mla_q_lora", "mla_kv_lora", "mla_nope", "mla_rope", "mla_v",
)  # fmt: skip


def anatomy_of(row: Row) -> Anatomy:
    """The model that a row's columns describe. ValueError where layers, hidden, heads or vocab are missing."""
    return _anatomy(tuple(row.get(name, "") for name in _SHAPE))


@lru_cache(maxsize=4096)
def _anatomy(values: tuple[str, ...]) -> Anatomy:
    row = dict(zip(_SHAPE, values, strict=True))
    h, layers = need(row, "hidden"), need(row, "layers")
    family = row["family"]
    bias = row["norm"].startswith("ln") and not family.startswith(NO_BIAS)
    experts, dense = whole(row, "n_experts"), whole(row, "n_dense_layers") or 0
    ffn = whole(row, "dense_ffn") or whole(row, "ffn") or 4 * h
    stacks = []
    if experts is None or dense:
        block = _block(row, h, bias, _feed(row, h, ffn, bias))
        stacks.append(Stack("text", layers if experts is None else dense, block))
    if experts is not None:
        stacks.append(Stack("text", layers - dense, _block(row, h, bias, _mixture(row, h, experts))))
    vocab = need(row, "vocab")
    tied = row["tied_embeddings"] == "yes"
    tables = [Table("tokens", vocab, h, head=tied)]
    if positions := whole(row, "learned_pos"):
        tables.append(Table("positions", positions, h))
    head = None if tied else Linear("head", h, vocab, bias=family == "phi-1.5")
    norms = 2 if family == "BLOOM" else 1  # BLOOM normalises its embeddings too
    return Anatomy(row["model"], tuple(stacks), tuple(tables), (), head, vocab, norms * _norm(row, h))


def _norm(row: Row, h: int) -> int:
    """Weights of one norm: gain and offset, gain alone, none."""
    return {"ln": 2 * h, "ln_nobias": 2 * h, "none": 0}.get(row["norm"], h)


def _block(row: Row, h: int, bias: bool, feed: tuple[Linear, ...]) -> Block:
    heads = need(row, "heads")
    kv, d = whole(row, "kv_heads") or heads, whole(row, "head_dim") or h // heads
    family = row["family"]
    norms = 1 if family == "phi-1.5" or row["model"] == "Falcon-7B" else 2
    vectors = norms * _norm(row, h)
    qk_norm = family in ("OLMo2", "nanochat")
    if family == "OLMo2":  # over all heads at once
        vectors += (heads + kv) * d
    if row["attn"] == "mla":
        own, core, extra = _mla(row, h, heads)
        vectors += extra
    else:
        own = (
            Linear("q", h, heads * d, bias),
            Linear("k", h, kv * d, bias),
            Linear("v", h, kv * d, bias),
            Linear("o", heads * d, h, bias, split="row"),
        )
        core = Attention(heads, kv, d, d)
    return Block(
        h,
        (*own, *feed),
        (core,),
        vectors,
        norms=norms,
        qk_norm=qk_norm,
        rope=not row["learned_pos"],
        gated=row["mlp_type"] == "glu",
        parallel=family in ("Falcon", "Pythia", "StableLM Alpha", "phi-1.5"),
    )


def _mla(row: Row, h: int, heads: int) -> tuple[tuple[Linear, ...], Attention, int]:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): low-rank queries, and keys and values
    that are unfolded from one latent; each key has a rotated part that the heads share."""
    kv, nope, rope, v = (need(row, f"mla_{x}") for x in ("kv_lora", "nope", "rope", "v"))
    q = whole(row, "mla_q_lora")
    queries = (
        (Linear("q", h, heads * (nope + rope)),)
        if q is None
        else (Linear("q_down", h, q, split="none"), Linear("q_up", q, heads * (nope + rope)))
    )
    linears = (
        *queries,
        Linear("kv_down", h, kv + rope, split="none"),
        Linear("kv_up", kv, heads * (nope + v)),
        Linear("o", heads * v, h, split="row"),
    )
    return linears, Attention(heads, heads, nope + rope, v, cached=kv + rope), kv + (q or 0)


def _feed(row: Row, h: int, ffn: int, bias: bool) -> tuple[Linear, ...]:
    gate = (Linear("gate", h, ffn, bias),) if row["mlp_type"] == "glu" else ()
    return (*gate, Linear("up", h, ffn, bias), Linear("down", ffn, h, bias, split="row"))


def _mixture(row: Row, h: int, experts: int) -> tuple[Linear, ...]:
    """Router, shared experts as one dense feed-forward, routed experts. DeepSeek-V3's router has a bias of its own that
    no gradient trains (arXiv:2412.19437, section 2.1.2): a published count has it."""
    width, active = whole(row, "moe_ffn") or need(row, "ffn"), need(row, "top_k")
    shared = (whole(row, "n_shared_experts") or 0) * width
    gated = row["mlp_type"] == "glu"
    linears = [Linear("router", h, experts, bias=row["attn"] == "mla", split="none")]
    if shared:
        linears += [
            Linear(f"shared_{x.name}", x.fan_in, x.fan_out, split=x.split)
            for x in _feed(row, h, shared, False)
        ]
    names = (("gate",) if gated else ()) + ("up",)
    linears += [Linear(name, h, width, copies=experts, active=active) for name in names]
    linears.append(Linear("down", width, h, copies=experts, active=active, split="row"))
    return tuple(linears)


# --- columns ----------------------------------------------------------------------------------------------


def number(row: Row, name: str) -> float | None:
    """A column's number, None where it is empty. ValueError, with the column, where it is none."""
    text = row.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} is {text!r}: it must be a number")
    return value


def whole(row: Row, name: str) -> int | None:
    """A column's positive whole number, None where it is empty. ValueError, with the column, where it is none."""
    value = number(row, name)
    if value is None:
        return None
    if value != int(value) or value < (0 if name in ("n_shared_experts", "n_dense_layers") else 1):
        raise ValueError(f"{name} is {row[name]!r}: it must be a positive whole number")
    return int(value)


def need(row: Row, name: str) -> int:
    """The same of a column that must not be empty."""
    value = whole(row, name)
    if value is None:
        raise ValueError(f"{name} is missing")
    return value
