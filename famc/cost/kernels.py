"""Seconds that one device computes for one block and micro-batch, by kind: products, attention, element-wise work.

In: a Stack of the anatomy, a Work (what the device and the software are). Out: Pass, forward and backward. Bears no identity.
"""

from __future__ import annotations

from dataclasses import dataclass

from famc.cost import matmul, sums
from famc.cost.anatomy import Anatomy, Attention, Block, Linear, Stack
from famc.cost.device import Device
from famc.cost.fitted import Constants
from famc.cost.software import Practice

FLASH1 = 0.6
"""FlashAttention's first version for one of its second (Dao 2023, arXiv:2307.08691, section 4.1: 1.7 to 3 times slower)."""
FLASH_BACKWARD = 3.0
"""Its backward for one forward: 5 products for 2, at a lower rate (same source, figures 4 and 5)."""
FLASH_TILE = 64.0
"""Half a tile of keys: a causal query pays for the whole tile that its diagonal crosses."""
HEAD_HALF = 32.0
"""Head width at which softmax takes as long as the products (assumed; exponentials are bound to their own units)."""
DRIVEN = 550e12
"""bf16 FLOP/s above which a chip's tensor cores need asynchronous instructions that FlashAttention-2 does not use
(Shah et al. 2024, arXiv:2407.08608: 35 % of an H100)."""
SCORES_RATE = 0.7
"""Rate of attention's batched products, with their short sides, for one of large ones. Assumed."""
ROTATED = 5.0
"""Traffic of rotating queries and keys step by step for that of one kernel: to fp32, a complex product, and back."""
ROWWISE = 5.0
"""Casting passes of row-wise scales for one of tensor-wise ones. Assumed."""
LOSS, LOSS_EAGER = 8.0, 16.0
"""Bytes a logit that the loss and its gradient move: read and written once at 16 bits, and copies in fp32 where unfused."""
ROUTED = 10.0
"""Passes over the routed hidden states: permuted, padded, weighed, summed, and buffers of the exchange. Assumed."""
SMALL, SMALL_EAGER, SMALL_ROUTED = 4.0, 14.0, 12.0
"""Element-wise kernels of a block's forward: fused, what eager adds, what routing adds. Counted in the stacks' code."""


@dataclass(slots=True)
class Pass:
    """Seconds on one device, and how many kernels are started."""

    matmul: float = 0.0
    attention: float = 0.0
    vector: float = 0.0
    kernels: float = 0.0

    def add(self, other: Pass, times: float = 1.0) -> None:
        """Add the other, so many times."""
        self.matmul += times * other.matmul
        self.attention += times * other.attention
        self.vector += times * other.vector
        self.kernels += times * other.kernels

    @property
    def busy(self) -> float:
        """Seconds of all kinds."""
        return self.matmul + self.attention + self.vector


@dataclass(frozen=True, slots=True)
class Work:
    """What is the same for all blocks of a step. `rows`: tokens of a micro-batch on the device. `plain`, `low`: FLOP/s of
    products at 16 bits and at the layout's precision; `core`: the best rate, for attention. `vector`: bytes/s of
    element-wise kernels. `tp_vectors`: ranks that share element-wise work. `trained`: share of the weights with gradients; `adapted`:
    the layers with low-rank adapters, attention or all, if any; `packed`: bytes of a frozen weight below 16 bits, else 0."""

    device: Device
    practice: Practice
    c: Constants
    rows: float
    seq_len: float
    document: float
    tp: int
    cp: int
    ep: int
    tp_vectors: int
    precision: str
    plain: float
    low: float
    core: float
    vector: float
    trained: float
    adapted: str
    packed: float
    fused_loss: bool


def block(s: Stack, w: Work) -> tuple[Pass, Pass]:
    """(forward, backward) of one block of the stack."""
    b, c, forward, backward = s.block, w.c, Pass(), Pass()
    rows = w.rows * s.share
    cast = w.precision in matmul.LOW
    inner = 0.0  # numbers a token that the feed-forward's activation reads
    for x in _grouped(b.linears) if w.practice.fused >= 0.5 else b.linears:
        m = w.rows * s.source if x.cross else rows
        _linear(x, m, w, cast and x.split != "none", forward, backward)
        if x.split == "column" and not _feeds_attention(x):
            inner += x.active * (c.imbalance if x.copies > 1 else 1.0) * x.fan_out / w.tp
    for a in b.attentions:
        _attention(a, s, rows, w, forward, backward)
    mixture = next((x for x in b.linears if x.copies > 1), None)
    passes, turned = _passes(b, inner, mixture, w)
    loose = 1.0 - w.practice.fused
    moved = 2.0 * rows * (passes * (1.0 + (c.eager - 1.0) * loose) + turned * (1.0 + (ROTATED - 1.0) * loose))
    count = SMALL + SMALL_EAGER * loose + (SMALL_ROUTED if mixture is not None else 0.0)
    once = Pass(vector=moved / w.vector + count * c.kernel, kernels=count)
    forward.add(once)
    backward.add(once, 2.0)
    return forward, backward


def head(a: Anatomy, w: Work) -> Pass:
    """A third of the logits, the loss and the layers outside of blocks: forward, or one of two backward products."""
    out, d = Pass(), w.device
    for x in a.linears:
        out.matmul += matmul.seconds(w.rows, x.fan_out, x.fan_in, w.plain, d.bandwidth, w.c)
        out.kernels += 1
    if not a.vocab:
        return out
    width = a.head.fan_in if a.head is not None else max((t.width for t in a.tables if t.head), default=0)
    if not width:
        return out
    rows = w.rows * a.head_share
    out.matmul += matmul.seconds(rows, a.vocab / w.tp, width, w.plain, d.bandwidth, w.c)
    loose = 0.0 if w.fused_loss else 1.0 - w.practice.fused
    out.vector = rows * a.vocab / w.tp * (LOSS + LOSS_EAGER * loose) / 3.0 / w.vector
    out.kernels += 6.0
    return out


# --- inside of a block ------------------------------------------------------------------------------------


def _feeds_attention(x: Linear) -> bool:
    return x.name.startswith(("q", "k", "v", "cross"))


def _grouped(linears: tuple[Linear, ...]) -> tuple[Linear, ...]:
    """Products that read the same input made as one: q, k and v; gate and up."""
    out: list[Linear] = []
    for x in linears:
        last = out[-1] if out else None
        joins = x.name in ("k", "v") or (x.name.endswith("up") and not _feeds_attention(x))
        if (
            last is not None
            and joins
            and (x.split, x.fan_in, x.copies) == (last.split, last.fan_in, last.copies)
        ):
            wide = last.fan_out + x.fan_out
            out[-1] = Linear(last.name, x.fan_in, wide, x.bias, x.copies, x.active, x.split, x.cross)
        else:
            out.append(x)
    return tuple(out)


def _linear(x: Linear, rows: float, w: Work, low: bool, forward: Pass, backward: Pass) -> None:
    """One product forward, one for the input's gradient, one for the weights' if they are trained; casts below 16 bits.
    Experts lie on `ep` ranks, to which as many tokens come as go."""
    d, c = w.device, w.c
    n, k = float(x.fan_out), float(x.fan_in)
    if x.split == "column":
        n /= w.tp
    elif x.split == "row":
        k /= w.tp
    copies = 1.0
    m = rows
    if x.copies > 1:
        m, copies = rows * x.active * c.imbalance, x.copies / w.ep
    fast = w.low if low else w.plain
    forward.matmul += matmul.seconds(m, n, k, fast, d.bandwidth, c, copies)
    backward.matmul += matmul.seconds(m, k, n, fast, d.bandwidth, c, copies)
    forward.kernels += 1
    backward.kernels += 1
    if w.trained > 0.0:
        backward.matmul += w.trained * matmul.seconds(n * copies, k, m / copies, fast, d.bandwidth, c)
        backward.kernels += 1
    if low:
        passes = c.quantise * (ROWWISE if w.precision == "fp8-rowwise" else 1.0) * 4.0
        forward.vector += passes * m * k / d.bandwidth
        backward.vector += passes * m * n / d.bandwidth
    if (
        w.packed
    ):  # unpacked to 16 bits before each product (bitsandbytes; no measured step is in the calibration)
        unpack = Pass(vector=(w.packed + 2.0) * n * k * copies / w.vector + c.kernel, kernels=1)
        forward.add(unpack)
        backward.add(unpack)
    if w.adapted == "all" or (w.adapted == "attention" and (_feeds_attention(x) or x.name == "o")):
        # a thin product in, one out, and their sum with the frozen layer's output
        thin = Pass(vector=2.0 * m * (k + 3.0 * n) / w.vector + 3 * c.kernel, kernels=3)
        forward.add(thin)
        backward.add(thin, 2.0)


def _attention(a: Attention, s: Stack, rows: float, w: Work, forward: Pass, backward: Pass) -> None:
    """Scores and weighted sums. In memory: two batched products, and passes over the whole square of scores. Flash: work
    at a share of the best rate, by kernel, chip and width of a head."""
    c = w.c
    queries = float(s.length) if s.length is not None else s.share * w.seq_len
    keys = queries
    if a.cross:
        keys = float(s.source_length) if s.source_length is not None else s.source * w.seq_len
    elif s.length is None:
        queries = keys = min(queries, w.document)
    heads, width = a.heads / w.tp, float(a.qk_dim + a.v_dim)
    if w.practice.attention == "scores" or not a.flash:
        pairs = rows * keys * heads
        work = 2.0 * pairs * width / (SCORES_RATE * w.plain)
        moved = c.scores * 2.0 * pairs / w.vector
        forward.add(Pass(attention=work + moved + 8 * c.kernel, kernels=8))
        backward.add(Pass(attention=2.0 * work + 1.3 * moved + 16 * c.kernel, kernels=16))
        return
    seen = sums.seen(a, queries, keys) + FLASH_TILE
    share = c.flash
    if w.practice.attention == "vendor":
        share = c.vendor
    elif w.core > DRIVEN:
        share = c.flash_new
    if w.practice.attention == "flash1":
        share *= FLASH1
    if w.cp > 1:
        share /= w.practice.ring
    share *= width / (width + 2 * HEAD_HALF) * (128.0 + HEAD_HALF) / 128.0
    once = 2.0 * rows * heads * seen * width / (share * w.core)
    forward.add(Pass(attention=once + c.kernel, kernels=1))
    backward.add(Pass(attention=FLASH_BACKWARD * once + 3 * c.kernel, kernels=3))


def _passes(b: Block, inner: float, mixture: Linear | None, w: Work) -> tuple[float, float]:
    """Numbers a token that element-wise work reads and writes, forward: norms (2 each), two residual sums (3 each), the
    activation (1.5 of each of its inputs), what routing moves; and of rotated or normalised queries and keys."""
    hidden = b.hidden / w.tp_vectors
    passes = (2.0 * b.norms + 6.0) * hidden + 1.5 * inner
    if mixture is not None:
        passes += ROUTED * mixture.active * hidden
    heads = sum((a.heads + a.kv_heads) * a.qk_dim for a in b.attentions) / w.tp
    return passes, heads * ((2.0 if b.rope else 0.0) + (2.0 if b.qk_norm else 0.0))
