"""The dimensions of a model: published ones, and ones found for a parameter count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

DECODERS = ("qwen3", "qwen3_moe", "llama")
"""Read left to right, and write what follows."""
ENCODERS = ("bert", "modernbert")
"""Read a text in both directions; pretrained to fill in masked tokens, so they carry that head."""
ENCODER_DECODERS = ("t5",)
"""Read a text in both directions, and write another one; as many blocks in the decoder as in the encoder."""
ARCHS = (*DECODERS, *ENCODERS, *ENCODER_DECODERS)
"""HF `model_type`s whose parameters famc can count. A new one: here and in `parameters.count`."""

ROTARY = (*DECODERS, "modernbert")
"""The others learn positions (bert: a row for each of `context`) or a bias for each distance (t5)."""
MODERNBERT_THETA = 160000.0
"""Rotary base of ModernBERT's global layers; its local ones keep 10,000 (transformers' defaults)."""


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
    """One model. Fields are Hugging Face config values under short names.

    `layers` of t5 stand in the encoder, and as many in the decoder. `ffn` is the width between the matrices:
    half of what ModernBERT's `Wi` puts out, which is gate and value. `context` of bert counts parameters.
    """

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
        if self.head_dim % 2 and self.arch in ROTARY:
            raise ValueError(f"head_dim is {self.head_dim}: rotary positions need an even number")
        if self.arch not in DECODERS:
            if self.kv_heads != self.heads:
                raise ValueError(f"{self.arch} has a key/value head for each of its {self.heads} heads")
            if not self.tie:
                raise ValueError(f"{self.arch} shares the embedding with its output head")
        if self.arch in ENCODERS and self.heads * self.head_dim != self.hidden:
            raise ValueError(f"{self.arch}'s {self.heads} heads must share hidden {self.hidden} evenly")
        if (self.moe is not None) != (self.arch == "qwen3_moe"):
            raise ValueError(f"{self.arch} {'takes no' if self.moe else 'needs'} experts")


def _qwen3(
    layers: int, hidden: int, ffn: int, heads: int, kv: int, tie: bool, moe: Moe | None = None
) -> Shape:
    arch = "qwen3_moe" if moe else "qwen3"
    return Shape(arch, 151936, layers, hidden, ffn, heads, kv, 128, tie, 40960, 1e6, moe)


def _llama3(layers: int, hidden: int, ffn: int, heads: int, head_dim: int, tie: bool) -> Shape:
    return Shape("llama", 128256, layers, hidden, ffn, heads, 8, head_dim, tie, 131072, 5e5)


def _encoder(
    arch: str, vocab: int, layers: int, hidden: int, ffn: int, context: int, theta: float = 10000.0
) -> Shape:
    return Shape(arch, vocab, layers, hidden, ffn, hidden // 64, hidden // 64, 64, True, context, theta)


def _t5(layers: int, hidden: int, ffn: int, heads: int) -> Shape:
    return Shape("t5", 32128, layers, hidden, ffn, heads, heads, 64, True, 512)


# The config.json of google-bert/bert-{base,large}-uncased, answerdotai/ModernBERT-{base,large} and
# google/t5-v1_1-{small,base,large}; the head of T5 v1.1 was untied, which transformers 5 no longer builds.
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
    "bert-base": _encoder("bert", 30522, 12, 768, 3072, 512),
    "bert-large": _encoder("bert", 30522, 24, 1024, 4096, 512),
    "modernbert-base": _encoder("modernbert", 50368, 22, 768, 1152, 8192, MODERNBERT_THETA),
    "modernbert-large": _encoder("modernbert", 50368, 28, 1024, 2624, 8192, MODERNBERT_THETA),
    "t5-small": _t5(8, 512, 1024, 6),
    "t5-base": _t5(12, 768, 2048, 12),
    "t5-large": _t5(24, 1024, 2816, 16),
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
# Of encoders: width over depth, and ffn over hidden, of the presets above.
_ENCODER_ASPECT = {"bert": 55.0, "modernbert": 36.0, "t5": 58.0}
_ENCODER_FFN = {"bert": 4.0, "modernbert": 2.0, "t5": 2.5}
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
    models of the architecture.

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
    decoder = arch in DECODERS
    tied = (params < _TIED_BELOW or not decoder) if tie is None else tie
    wish = head_dim or (128 if params >= 4e8 and decoder else 64 if params >= 4e6 else 32)
    theta = (
        10000.0 if context <= 8192 else 5e5 if arch == "llama" else 1e6
    )  # base raised for long context, as published
    candidates = _candidates if decoder else _encoder_candidates
    for dim in (wish,) if head_dim else tuple(d for d in (128, 64, 32, 16) if d <= wish):
        best: tuple[float, Shape] | None = None
        for score, shape in candidates(arch, params, vocab, tied, dim, context, theta):
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


def _encoder_candidates(
    arch: str, params: int, vocab: int, tie: bool, dim: int, context: int, theta: float
) -> Iterator[tuple[float, Shape]]:
    """As `_candidates`, for encoders and T5; their count is a straight line in ffn, so two of them give it."""
    from famc.cost.parameters import count

    aspect, ratio = _ENCODER_ASPECT[arch], _ENCODER_FFN[arch]
    theta = MODERNBERT_THETA if arch == "modernbert" else 10000.0
    for hidden in range(dim, 32768 + 1, dim):
        if vocab * hidden >= params:
            return
        grain = 64 if hidden >= 256 else 32 if hidden >= 128 else 8
        heads, middle = hidden // dim, hidden / aspect
        for layers in range(max(2, int(middle / 1.6)), min(int(middle * 1.6) + 2, 160)):
            least = Shape(arch, vocab, layers, hidden, grain, heads, heads, dim, tie, context, theta)
            first, second = count(least).total, count(replace(least, ffn=2 * grain)).total
            ffn = round(1 + (params - first) / (second - first)) * grain
            if not 0.5 * ratio * hidden <= ffn <= 1.6 * ratio * hidden:
                continue
            uneven = 0.1 * (layers % 2)
            score = abs(math.log(hidden / layers / aspect)) + abs(math.log(ffn / (ratio * hidden))) + uneven
            yield score, replace(least, ffn=ffn)


def _interpolate(table: tuple[tuple[float, float], ...], x: float) -> float:
    """Piecewise linear in log x, flat outside the table."""
    if x <= table[0][0]:
        return table[0][1]
    for (x0, y0), (x1, y1) in pairwise(table):
        if x <= x1:
            return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
    return table[-1][1]
