"""Seconds of a training step on a CPU: matrix products by their size, element-wise passes by their bytes, starts by their number.

In: a model's anatomy, what a step reads, a CPU's measured rates (famc.cost.cpu_rates). Out: seconds by cause. On a CPU a small
model spends half of its step outside matrix products, so a share of the peak says little; here each pass over a tensor is paid
by the bytes that it moves, at the rate which tensors of that size were measured to have.

The constants count passes in bytes an element, forward and backward together. They hold for PyTorch's eager mode, as famc's
workers run it (no torch.compile), and were fitted by `benchmarks/cpu_time.py` to single-thread steps; its table gives residuals.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import sqrt
from typing import Literal

from famc.cost.anatomy import Anatomy, Attention, Block, Linear
from famc.cost.cpu_rates import CpuRates, ThreadRates
from famc.cost.shape import Shape

COLD = 4e6
"""Bytes below which a tensor is hot in a loop over one operation, but not in a step, whose tensors push each other out."""
EAGER_CONTEXT = 512
"""Rows up to this length train with attention's scores written out (famc.work.training.attention)."""
LAYER_NORMS = frozenset({"bert", "modernbert", "gpt2", "gpt_neox", "opt", "bloom", "mpt", "falcon", "phi", "starcoder2", "vit", "siglip_vision_model", "clip_vision_model", "whisper"})  # fmt: skip
"""Architectures with torch's layer norm, one operation; the others' RMS norms are six in transformers' models."""
PROBE = Shape("qwen3", 4096, 4, 256, 768, 4, 2, 64, True, 256)
PROBE_ROWS = 8
"""What `famc calibrate` trains for a moment to hold the figures to: Qwen3's block, wide and deep enough for blocks to rule."""
NEWTON_SCHULZ = 5
"""Steps that Muon's orthogonalisation takes (torch.optim.Muon; arXiv:2502.16982, section 2.1)."""

Head = Literal["fused", "logits", "none"]


@dataclass(frozen=True, slots=True)
class Constants:
    """Bytes an element moves in a step, forward and backward, and what multiplies measured rates."""

    norm: float = (
        336.0  # of the hidden state: an RMS norm in its separate operations, and the residual beside it
    )
    layer_norm: float = 58.0  # the same of torch's fused layer norm
    rope: float = 340.0  # of queries and keys
    feed: float = 70.0  # of the width between the feed-forward's matrices
    score: float = 100.0  # of attention's scores, written out
    flash: float = 31.0  # of scores that are never written: softmax inside the kernel
    logit: float = 46.0  # of the logits, in slices
    follow: float = 250.0  # of logits that follow a teacher's: both softmaxes, the distance, its gradient
    whole: float = 130.0  # of the logits as one tensor in fp32, with trl's log-probabilities and entropies
    bag: float = 440.0  # of a text's vector in the lexical start
    product: float = 1.14  # a plain product's rate over that of a linear layer as wide, which casts and keeps
    update: float = 42.0  # of a parameter: clipping, AdamW, the next step's zeros
    layer: float = 160.0  # operations of a block, forward and backward
    tensor: float = 2.9  # operations of a parameter tensor in the update


FITTED = Constants()


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step reads: `passes` times `rows` sequences of `context` tokens (padding included).

    `head`: `fused`: the loss is taken from hidden states a slice at a time (packed kinds); `logits`: as a tensor in fp32 (trl);
    `none`: no logits. `counted`: share of the tokens that have logits. `trained`: share of weights with gradients (adapters).
    `teachers`: models that read the same without gradients; `follow`: whether the loss compares their logits (distillation).
    `recompute`: whether blocks run forward twice, also for gradients that are cached (GradCache). `varied`: whether every pass
    has another length, so that its kernels are compiled first (kinds that do not pack).
    """

    anatomy: Anatomy
    rows: int
    context: int
    passes: int = 1
    precision: str = "bf16"
    optimizer: Literal["adamw", "muon"] = "adamw"
    head: Head = "fused"
    counted: float = 1.0
    trained: float = 1.0
    teachers: tuple[Anatomy, ...] = ()
    follow: bool = False
    recompute: bool = False
    varied: bool = False


@dataclass(frozen=True, slots=True)
class CpuStep:
    """Seconds of a step by cause."""

    linears: float
    attention: float
    vectors: float
    head: float
    optimizer: float
    starts: float
    overhead: float

    @property
    def seconds(self) -> float:
        return float(sum(getattr(self, f.name) for f in fields(self)))


def step_seconds(step: Step, rates: CpuRates, *, threads: int = 1, constants: Constants = FITTED) -> CpuStep:
    """Seconds of one optimizer step with `threads` threads, Trainer's own time included.

    Each part is multiplied by `rates.residual`, what a real step took here over what is reckoned, but Trainer's time.
    ValueError for a precision that was not measured.
    """
    at, c = rates.at(threads), constants
    model = _passes(step.anatomy, step, at, c, backward=True)
    for teacher in step.teachers:
        read = _passes(teacher, step, at, c, backward=False)
        model = tuple(a + b for a, b in zip(model, read, strict=True))
    linears, attention, vectors, head, starts = (x * step.passes * rates.residual for x in model)
    update, tensors = _update(step, at, c)
    return CpuStep(
        linears=linears,
        attention=attention,
        vectors=vectors,
        head=head,
        optimizer=update * rates.residual,
        starts=starts + tensors * rates.residual,
        overhead=rates.step_overhead,
    )


def forward_seconds(step: Step, rates: CpuRates, *, threads: int = 1, constants: Constants = FITTED) -> float:
    """Seconds of `step.passes` forward passes alone: a third of what forward and backward take together."""
    read = _passes(step.anatomy, step, rates.at(threads), constants, backward=False)
    return float(sum(read)) * step.passes * rates.residual


def _moved(at: ThreadRates, size: float) -> float:
    """bytes/s of passes over tensors of `size` bytes within a step."""
    return at.vector_rate(max(size, COLD))


# --- one pass over a micro-batch ----------------------------------------------------------------------------


def _passes(
    anatomy: Anatomy, step: Step, at: ThreadRates, c: Constants, *, backward: bool
) -> tuple[float, ...]:
    """(linears, attention, vectors, head, starts) of one micro-batch. Forward is a third of the work of both."""
    whole = (2.0 + step.trained) / 3.0 if backward else 1.0 / 3.0
    again = 1.0 / 3.0 if backward and step.recompute else 0.0
    linears = attention = vectors = starts = 0.0
    for stack in anatomy.stacks:
        tokens, length = step.rows * step.context * stack.share, step.context * stack.share
        block = stack.block
        linears += stack.layers * sum(_linear(x, tokens, step.precision, at) for x in block.linears)
        attention += stack.layers * sum(
            _attention(x, tokens, length, step.precision, at, c) for x in block.attentions
        )
        vectors += stack.layers * _vectors(block, tokens, at, c, anatomy.name in LAYER_NORMS)
        starts += stack.layers * c.layer * at.operation
        if step.varied:  # alike layers share their kernels
            shapes = {(x.fan_in, x.fan_out) for x in block.linears}
            starts += sum(at.first_seconds(step.precision, sqrt(i * o)) for i, o in shapes)
            starts += sum(2 * at.first_seconds(step.precision, x.qk_dim) for x in block.attentions)
    tokens = step.rows * step.context * step.counted
    linears += sum(_linear(x, float(step.rows * step.context), step.precision, at) for x in anatomy.linears)
    blocks = tuple(x * (whole + again) for x in (linears, attention, vectors))
    return (
        *blocks,
        _head(anatomy, step, tokens, at, c) * (1.0 if backward else 1.0 / 3.0),
        starts * (whole + again),
    )


def _linear(linear: Linear, tokens: float, precision: str, at: ThreadRates) -> float:
    """Forward and backward of a linear layer's active copies; each copy meets its share of the tokens."""
    met = tokens * linear.active / linear.copies
    flops = 6.0 * met * linear.fan_in * linear.fan_out * linear.copies
    return flops / at.linear_rate(precision, sqrt(linear.fan_in * linear.fan_out), met)


def _attention(
    core: Attention, tokens: float, length: float, precision: str, at: ThreadRates, c: Constants
) -> float:
    """Scores and sums, and the passes over scores. Eager attention works on masked scores too."""
    eager = length <= EAGER_CONTEXT or not core.flash
    seen = length if eager else min(length, core.window or length) * (0.5 if core.causal else 1.0)
    flops = 6.0 * tokens * seen * core.heads * (core.qk_dim + core.v_dim)
    rate = at.linear_rate(precision, sqrt(core.qk_dim * max(seen, 1.0)), tokens) * c.product
    scores = tokens * seen * core.heads
    moved = scores * c.score / _moved(at, scores * 3.0) if eager else scores * c.flash / at.softmax
    return flops / rate + moved


def _vectors(block: Block, tokens: float, at: ThreadRates, c: Constants, fused: bool) -> float:
    """Norms, residuals, rotary positions, and what stands between the feed-forward's matrices."""
    wide = sum(x.heads * x.qk_dim + x.kv_heads * x.qk_dim for x in block.attentions)
    hidden = tokens * block.hidden
    seconds = hidden * block.norms * (c.layer_norm if fused else c.norm) / _moved(at, hidden * 4.0)
    if wide:
        each = tokens * wide * ((c.norm if block.qk_norm else 0.0) + (c.rope if block.rope else 0.0))
        seconds += each / _moved(at, tokens * wide * 4.0 / 2)
    # what the block's matrices make of the hidden state, less queries, keys and values: gate and up, or up alone
    outward = [x for x in block.linears if x.fan_in == block.hidden]
    feed = sum(x.fan_out * x.active for x in outward) - wide
    feed -= sum(x.kv_heads * x.v_dim for x in block.attentions)
    if feed > 0:
        met = max(x.fan_out * x.active / x.copies for x in outward)
        seconds += feed * tokens * c.feed / _moved(at, met * tokens * 2.0)
    return seconds


def _head(anatomy: Anatomy, step: Step, tokens: float, at: ThreadRates, c: Constants) -> float:
    """The output head's products and the passes over logits; slices of 512 rows stay in a cache, a whole tensor does not."""
    if step.head == "none" or not anatomy.vocab:
        return 0.0
    width = anatomy.head.fan_in if anatomy.head else next((t.width for t in anatomy.tables if t.head), 0)
    if not width:
        return 0.0
    flops = 6.0 * tokens * width * anatomy.vocab
    rate = at.linear_rate(step.precision, sqrt(width * anatomy.vocab), min(tokens, 512.0)) * c.product
    rows = min(tokens, 512.0) if step.head == "fused" else tokens
    logits = tokens * anatomy.vocab
    passes = c.logit if step.head == "fused" else c.whole
    if step.follow and anatomy is step.anatomy:
        passes += c.follow
    return flops / rate + logits * passes / _moved(at, rows * anatomy.vocab * 4.0)


def _update(step: Step, at: ThreadRates, c: Constants) -> tuple[float, float]:
    """(clipping and the optimizer, starts) of a step."""
    weights = tensors = products = 0.0
    for stack in step.anatomy.stacks:
        block = stack.block
        for x in block.linears:
            weights += stack.layers * x.weights
            tensors += stack.layers
            if step.optimizer == "muon":
                products += stack.layers * x.copies * _newton_schulz(x, at, c)
        weights += stack.layers * block.vectors
        tensors += stack.layers * block.norms
    for table in step.anatomy.tables:
        weights += table.weights
        tensors += 1
    weights += step.anatomy.vectors + sum(x.weights for x in step.anatomy.linears)
    weights += step.anatomy.head.weights if step.anatomy.head else 0
    weights *= step.trained
    moved = weights * c.update / _moved(at, weights / max(tensors, 1.0) * 4.0)
    starts = tensors * c.tensor * at.operation * (NEWTON_SCHULZ if step.optimizer == "muon" else 1)
    return moved + products * step.trained, starts


def _newton_schulz(x: Linear, at: ThreadRates, c: Constants) -> float:
    """Muon: five times A = X Xᵀ, B = bA + cA², X = aX + BX in bf16, X with fewer rows than columns."""
    short, long = sorted((x.fan_in, x.fan_out))
    flops = NEWTON_SCHULZ * (4.0 * short * short * long + 2.0 * short**3)
    known = dict(at.linear)
    precision = "bf16" if "bf16" in known else at.linear[0][0]
    return flops / (at.linear_rate(precision, sqrt(short * long), float(short)) * c.product)


# --- a bag of words -----------------------------------------------------------------------------------------


def lexical_seconds(
    steps: float, batch: int, columns: int, shape: Shape, dims: tuple[int, ...], rates: CpuRates,
    *, constants: Constants = FITTED,
) -> float:  # fmt: skip
    """Seconds of an embedder's lexical start (famc.work.lexical) with one thread: `steps` updates of the token table by `batch`
    queries with their positive and negatives, `columns` texts in all (2 without negatives).

    Each text is gathered, summed and normalised, forward and backward; similarities of all queries and passages are taken in
    both directions, in fp32, at the widths `dims` (Matryoshka); Adam moves the whole table.
    """
    at = rates.at(1)
    texts = batch * columns * shape.hidden * constants.bag / at.vector_rate(64e6)
    pairs = batch * batch * (columns - 1) + batch * batch
    near = 6.0 * pairs * sum(dims) / at.linear_rate("fp32", float(shape.hidden), float(batch))
    table = float(shape.vocab * shape.hidden)
    moved = table * constants.update / _moved(at, table * 4.0)
    return rates.residual * steps * (texts + near + moved)
