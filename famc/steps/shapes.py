"""A size as written -> its Shape: explicit dimensions, a preset, or dimensions solved for a parameter count.

A size may have another architecture than its family. Tokenizer, vocabulary and positions are the family's.
Raises ValueError with a sentence that the spec's checks show beside the size; WrongField names the field too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from famc.cost.shape import (
    ARCHS,
    DECODERS,
    ENCODERS,
    MODERNBERT_THETA,
    PRESETS,
    ROTARY,
    Moe,
    Shape,
    solve,
)
from famc.errors import did_you_mean
from famc.spec.family import Arch, Family, Size

ROPE_THETA = 10000.0  # of decoders, unless the spec says otherwise


class WrongField(ValueError):
    """What is wrong with one field of a size."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def vocab_rows(family: Family) -> int:
    """Rows of the embedding: arch.vocab_pad, else the tokenizer's vocabulary rounded up to 64 (tensor cores,
    TP).
    """
    if family.arch.vocab_pad:
        return family.arch.vocab_pad
    return -(-(family.tokenizer.vocab or 32000) // 64) * 64


def shape_of(family: Family, size: str) -> Shape:
    """The dimensions of one size."""
    return _shape(family.arch, family.sizes[size], vocab_rows(family))


@lru_cache(maxsize=4096)
def _shape(arch: Arch, size: Size, vocab: int) -> Shape:
    if arch.type not in ARCHS:
        raise ValueError(f"unknown architecture '{arch.type}'; {did_you_mean(arch.type, ARCHS)}")
    if size.arch is not None and size.arch not in ARCHS:
        raise WrongField("arch", f"unknown architecture '{size.arch}'; {did_you_mean(size.arch, ARCHS)}")
    kind = size.arch or arch.type
    if kind not in DECODERS:
        _bounds(kind, size)
    shape = _dimensions(arch, kind, size, vocab)
    if kind in ENCODERS and size.arch is None and arch.head_dim not in (None, shape.head_dim):
        # a decoder family's head_dim is not meant for its encoders; an encoder family's own must be true
        whose = f"heads of {kind} are hidden / heads wide, here {shape.head_dim}"
        raise ValueError(f"head_dim is {arch.head_dim}: {whose}")
    return shape


def _dimensions(arch: Arch, kind: str, size: Size, vocab: int) -> Shape:
    """Written out, of a preset, or solved."""
    theta = _rope_theta(arch, kind)
    explicit = {"layers": size.layers, "hidden": size.hidden, "heads": size.heads}
    ways = [
        name
        for name, used in (
            ("dimensions", any(explicit.values())),
            ("preset", size.preset),
            ("params", size.params),
        )
        if used
    ]
    if len(ways) != 1:
        raise ValueError(
            "give one of: layers, hidden, heads and ffn; a preset; or params"
            + (f" (not {' and '.join(ways)})" if ways else "")
        )
    if size.preset:
        if size.preset not in PRESETS:
            raise ValueError(f"unknown preset '{size.preset}'; {did_you_mean(size.preset, PRESETS)}")
        published = PRESETS[size.preset]
        if published.arch.removesuffix("_moe") != kind.removesuffix("_moe"):
            whose = "the size" if size.arch else "the family"
            cure = f"; write arch: {published.arch} beside it" if published.arch not in DECODERS else ""
            raise ValueError(f"preset '{size.preset}' is {published.arch}, {whose} is {kind}{cure}")
        return replace(published, vocab=vocab, context=arch.context, rope_theta=theta)
    if size.params:
        heads = None if kind in ENCODERS and size.arch else arch.head_dim
        found = solve(kind, size.params, vocab, size.tie, heads, arch.context)
        return replace(found, rope_theta=theta)
    missing = [name for name, value in explicit.items() if value is None]
    if missing:
        raise ValueError(f"needs {' and '.join(missing)} as well")
    assert size.layers and size.hidden and size.heads  # the line above
    if size.ffn is None and size.moe is None:
        raise ValueError("needs ffn (or moe)")
    free = arch.head_dim is not None and kind not in ENCODERS  # heads may be as wide as one likes
    if not free and size.hidden % size.heads:
        cure = "choose other numbers" if kind in ENCODERS else "set arch.head_dim, or choose other numbers"
        raise ValueError(f"hidden {size.hidden} does not divide into {size.heads} heads: {cure}")
    if size.moe and size.moe.active > size.moe.experts:
        raise ValueError(f"{size.moe.active} active experts of {size.moe.experts}")
    if size.moe and kind == "qwen3":
        kind = "qwen3_moe"  # one family may have dense and sparse sizes, as Qwen3 has
    head_dim = (arch.head_dim if free else None) or size.hidden // size.heads
    if kind == "modernbert" and head_dim % 2:
        raise ValueError(f"heads of {head_dim} (hidden / heads): rotary positions need an even number")
    return Shape(
        arch=kind,
        vocab=vocab,
        layers=size.layers,
        hidden=size.hidden,
        ffn=size.ffn or size.moe.ffn * size.moe.active if size.moe else size.ffn or 0,
        heads=size.heads,
        kv_heads=size.kv_heads or size.heads,
        head_dim=head_dim,
        tie=bool(size.tie) or kind not in DECODERS,
        context=arch.context,
        rope_theta=theta,
        moe=Moe(size.moe.experts, size.moe.active, size.moe.ffn) if size.moe else None,
    )


def _bounds(kind: str, size: Size) -> None:
    """What no encoder, and no T5, can have."""
    if size.moe is not None:
        raise WrongField("moe", f"{kind} takes no experts")
    if size.kv_heads is not None and size.kv_heads != size.heads:
        raise WrongField("kv_heads", f"{kind} has a key/value head for each head; leave kv_heads out")
    if size.tie is False:
        # BertForMaskedLM would keep a bias that nothing reads; T5Config of transformers 5 ties whatever it is told
        raise WrongField("tie", f"{kind} shares the embedding with its output head; leave tie out")


def _rope_theta(arch: Arch, kind: str) -> float:
    """The rotary base of an architecture: the family's is of its own sizes, not of ModernBERT's among decoders."""
    if kind == "modernbert":
        return (arch.rope_theta if arch.type == kind else None) or MODERNBERT_THETA
    return ROPE_THETA if kind not in ROTARY or arch.rope_theta is None else arch.rope_theta


def shape_values(
    shape: Shape, values: Mapping[str, Any], parent: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Dimensions as the worker reads them; a stage's own context and rope_theta win, then those of its parent, whose
    positions an earlier stage may have extended."""
    moe, inherited = shape.moe, parent or {}
    return {
        "arch": shape.arch, "vocab": shape.vocab, "layers": shape.layers, "hidden": shape.hidden, "ffn": shape.ffn,
        "heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "tie": shape.tie,
        "context": max(inherited.get("context") or shape.context, values.get("context") or 0),
        "rope_theta": values.get("rope_theta") or inherited.get("rope_theta") or shape.rope_theta,
        "moe": None if moe is None else {"experts": moe.experts, "active": moe.active, "ffn": moe.ffn},
    }  # fmt: skip
