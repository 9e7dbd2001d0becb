"""A size as written -> its Shape: explicit dimensions, a preset, or dimensions solved for a parameter count.

Raises ValueError with a sentence that the spec's checks show beside the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from famc.cost.shape import ARCHS, PRESETS, Moe, Shape, solve
from famc.errors import did_you_mean
from famc.spec.family import Arch, Family, Size

ENCODERS = ("bert", "modernbert", "t5")  # they come with the retrieval line


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
    if arch.type in ENCODERS:
        raise ValueError(f"architecture '{arch.type}' is not supported yet: use one of {', '.join(ARCHS)}")
    if arch.type not in ARCHS:
        raise ValueError(f"unknown architecture '{arch.type}'; {did_you_mean(arch.type, ARCHS)}")
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
        if published.arch.removesuffix("_moe") != arch.type.removesuffix("_moe"):
            raise ValueError(f"preset '{size.preset}' is {published.arch}, the family is {arch.type}")
        return replace(published, vocab=vocab, context=arch.context, rope_theta=arch.rope_theta)
    if size.params:
        found = solve(arch.type, size.params, vocab, size.tie, arch.head_dim, arch.context)
        return replace(found, rope_theta=arch.rope_theta)
    missing = [name for name, value in explicit.items() if value is None]
    if missing:
        raise ValueError(f"needs {' and '.join(missing)} as well")
    assert size.layers and size.hidden and size.heads  # the line above
    if size.ffn is None and size.moe is None:
        raise ValueError("needs ffn (or moe)")
    if arch.head_dim is None and size.hidden % size.heads:
        raise ValueError(
            f"hidden {size.hidden} does not divide into {size.heads} heads: set arch.head_dim, or choose other numbers"
        )
    if size.moe and size.moe.active > size.moe.experts:
        raise ValueError(f"{size.moe.active} active experts of {size.moe.experts}")
    kind = arch.type
    if size.moe and kind == "qwen3":
        kind = "qwen3_moe"  # one family may have dense and sparse sizes, as Qwen3 has
    return Shape(
        arch=kind,
        vocab=vocab,
        layers=size.layers,
        hidden=size.hidden,
        ffn=size.ffn or size.moe.ffn * size.moe.active if size.moe else size.ffn or 0,
        heads=size.heads,
        kv_heads=size.kv_heads or size.heads,
        head_dim=arch.head_dim or size.hidden // size.heads,
        tie=bool(size.tie),
        context=arch.context,
        rope_theta=arch.rope_theta,
        moe=Moe(size.moe.experts, size.moe.active, size.moe.ffn) if size.moe else None,
    )


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
