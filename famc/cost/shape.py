"""The dimensions of a decoder: published ones, and ones found for a parameter count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

ARCHS = ("qwen3", "qwen3_moe", "llama")
"""HF `model_type`s whose parameters famc can count. A new one: here and in `parameters.layer`."""


@dataclass(frozen=True, slots=True)
class Moe:
    """Sparse feed-forward: `active` of `experts` experts a token, each `ffn` wide."""

    experts: int
    active: int
    ffn: int

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.experts:
            raise ValueError(f"{self.active} active experts of {self.experts}: active must lie in 1..experts")
        if self.ffn < 1:
            raise ValueError(f"an expert's ffn is {self.ffn}: it must be at least 1")


@dataclass(frozen=True, slots=True)
class Shape:
    """One decoder. Fields are Hugging Face config values under short names."""

    arch: str
    vocab: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    tie: bool
    context: int
    rope_theta: float = 10000.0
    moe: Moe | None = None

    def __post_init__(self) -> None:
        if self.arch not in ARCHS:
            raise ValueError(f"architecture {self.arch!r} is not one of {', '.join(ARCHS)}")
        for name in ("vocab", "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary positions need an even number")
        if (self.moe is not None) != (self.arch == "qwen3_moe"):
            raise ValueError(f"{self.arch} {'takes no' if self.moe else 'needs'} experts")


def _qwen3(
    layers: int, hidden: int, ffn: int, heads: int, kv: int, tie: bool, moe: Moe | None = None
) -> Shape:
    arch = "qwen3_moe" if moe else "qwen3"
    return Shape(arch, 151936, layers, hidden, ffn, heads, kv, 128, tie, 40960, 1e6, moe)


def _llama3(layers: int, hidden: int, ffn: int, heads: int, head_dim: int, tie: bool) -> Shape:
    return Shape("llama", 128256, layers, hidden, ffn, heads, 8, head_dim, tie, 131072, 5e5)


# The config.json of Qwen/Qwen3-* and meta-llama/Llama-3.2-{1B,3B}, Llama-3.1-{8B,70B}. Llama 3.1/3.2 also
# scale RoPE (`rope_type: llama3`), which changes no count and is not part of a Shape.
PRESETS: dict[str, Shape] = {
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, 8, True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, 8, True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, 8, True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, 8, False),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, 8, False),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, 8, False),
    "qwen3-30b-a3b": _qwen3(48, 2048, 6144, 32, 4, False, Moe(128, 8, 768)),
    "qwen3-235b-a22b": _qwen3(94, 4096, 12288, 64, 4, False, Moe(128, 8, 1536)),
    "llama3-1b": _llama3(16, 2048, 8192, 32, 64, True),
    "llama3-3b": _llama3(28, 3072, 8192, 24, 128, True),
    "llama3-8b": _llama3(32, 4096, 14336, 32, 128, False),
    "llama3-70b": _llama3(80, 8192, 28672, 64, 128, False),
}

# Width over depth (hidden / layers) by total parameters: the Qwen3 and Llama 3 ladder; below 0.6 B the shapes
# famc's own small families use (4 x 128, 6 x 256, 12 x 768).
_ASPECT = (
    (1e6, 32.0),
    (6e6, 43.0),
    (1e8, 64.0),
    (6e8, 1024 / 28),
    (1.7e9, 2048 / 28),
    (4e9, 2560 / 36),
    (8e9, 4096 / 36),
    (1.5e10, 5120 / 40),
    (3.3e10, 5120 / 64),
    (7e10, 8192 / 80),
    (4e11, 16384 / 126),
)
_TIED_BELOW = 5e9  # Qwen3 ties up to 4B, Llama 3.2 up to 3B
_FFN_RATIO = (1.5, 5.0)  # accepted ffn / hidden; the target is 3 (Qwen3-0.6b, 1.7b, 8b)
_TOLERANCE = 0.02


@lru_cache(maxsize=4096)
def solve(
    arch: str,
    params: int,
    vocab: int,
    tie: bool | None = None,
    head_dim: int | None = None,
    context: int = 4096,
) -> Shape:
    """Dimensions whose exact count lies within 2 % (nearly always 1 %) of `params`, shaped like published
    families.

    Every hidden size and a few depths around the family's aspect ratio are tried; ffn takes up what is left
    and is rounded to a multiple of 64 (32 or 8 in tiny models). The winner is nearest to ffn = 3 x hidden and
    the ladder's aspect.
    """
    from famc.cost.parameters import count

    if arch == "qwen3_moe":
        raise ValueError(
            "a parameter count alone does not fix a mixture of experts: give its dimensions or a preset"
        )
    if not 1e6 <= params <= 5e11:
        raise ValueError(
            f"{params:,} parameters: famc finds dimensions for 1M to 500B; give the dimensions instead"
        )
    tied = params < _TIED_BELOW if tie is None else tie
    wish = head_dim or (128 if params >= 4e8 else 64 if params >= 4e6 else 32)
    theta = (
        10000.0 if context <= 8192 else 5e5 if arch == "llama" else 1e6
    )  # base raised for long context, as published
    for dim in (wish,) if head_dim else tuple(d for d in (128, 64, 32, 16) if d <= wish):
        best: tuple[float, Shape] | None = None
        for score, shape in _candidates(arch, params, vocab, tied, dim, context, theta):
            if best is not None and score >= best[0]:
                continue
            error = abs(count(shape).total / params - 1)
            score += 20 * max(0.0, error - 0.002)
            if error <= _TOLERANCE and (best is None or score < best[0]):
                best = (score, shape)
        if best is not None:
            return best[1]
    rows = vocab * (wish if head_dim else 16) * (1 if tied else 2)
    cure = "a smaller vocabulary, `tie: true`" if not tied else "a smaller vocabulary"
    raise ValueError(
        f"no {arch} of {params:,} parameters with a vocabulary of {vocab:,}: the narrowest embedding "
        f"alone has {rows:,}. Use {cure}, a smaller head_dim or more parameters"
    )


def _candidates(
    arch: str, params: int, vocab: int, tie: bool, dim: int, context: int, theta: float
) -> Iterator[tuple[float, Shape]]:
    """Shapes near `params`, each with its distance from the published proportions."""
    aspect = _interpolate(_ASPECT, params)
    for hidden in range(dim, 32768 + 1, dim):
        left = params - vocab * hidden * (1 if tie else 2)
        if left <= 0:
            return
        heads = hidden // dim
        kv = next(k for k in (8, 4, 2, 6, 5, 7, 3, 1) if heads % k == 0 and (heads >= 2 * k or heads == 1))
        # Few key/value heads, or a number that is no power of two, split badly under tensor parallelism.
        odd = 0.4 if kv & (kv - 1) or kv < min(4, (heads + 1) // 2) or 20 * kv < heads else 0.0
        attention = 2 * hidden * (heads + kv) * dim
        grain = 64 if hidden >= 256 else 32 if hidden >= 128 else 8
        middle = hidden / aspect
        for layers in range(max(2, int(middle / 1.6)), min(int(middle * 1.6) + 2, 160)):
            ffn = round((left / layers - attention) / (3 * hidden) / grain) * grain
            if not _FFN_RATIO[0] * hidden <= ffn <= _FFN_RATIO[1] * hidden:
                continue
            uneven = 0.1 * (layers % 2)  # an even depth divides into pipeline stages
            score = abs(math.log(hidden / layers / aspect)) + abs(math.log(ffn / (3 * hidden))) + odd + uneven
            yield score, Shape(arch, vocab, layers, hidden, ffn, heads, kv, dim, tie, context, theta)


def _interpolate(table: tuple[tuple[float, float], ...], x: float) -> float:
    """Piecewise linear in log x, flat outside the table."""
    if x <= table[0][0]:
        return table[0][1]
    for (x0, y0), (x1, y1) in pairwise(table):
        if x <= x1:
            return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
    return table[-1][1]
