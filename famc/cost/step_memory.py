"""Peak memory of a training step.

In: a Setup. Out: Memory, whose total is the peak that the framework's own allocator reports; `limit` says how much of a
device an allocator can get, `fits` compares the two. Bears no identity.

The peak is the larger of two moments: the loss (all activations that wait for their backward pass, and the logits with their
fp32 copies) and the start of the backward pass (the same activations, a block in work, its gradients). Weights, gradients and
moments are divided as ZeRO does (Rajbhandari et al. 2020, arXiv:1910.02054, section 5), over dp_shard x cp ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from famc.cost.activations import Adapted, Mode, kept
from famc.cost.anatomy import Stack
from famc.cost.cpu_time import EAGER_CONTEXT
from famc.cost.device import Impossible
from famc.cost.habits import Habits, habits
from famc.cost.memory import Memory, width
from famc.cost.setup import Setup, Software
from famc.cost.software import practice
from famc.cost.stages import Stage, stages, weights

LOW = ("fp8", "fp8-rowwise", "mxfp8", "nvfp4")
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.0, "muon": 4.0, "sgd": 4.0}
"""Bytes a weight: two fp32 moments, two of 8 bits, one fp32 momentum."""
CONTEXT = 0.8e9
"""CUDA's context and loaded kernels, which no allocator reports. Assumed."""
NCCL = 1.0e9
"""Buffers of NCCL's channels, where devices talk. Assumed."""
MARGIN = 0.05
"""Of the limit, that a step must leave free to be said to fit: about the model's mean error on published peaks. Two published
out-of-memory runs come out no more than 1.2 % above the limit itself."""
CPU = 0.5e9
"""The resident interpreter with torch (about 480 MB measured)."""
CPU_SHAPE, CPU_SHAPES = 25e6, 43
"""oneDNN compiles 16-bit kernels for each new length of a batch and caches them: bytes a length, and lengths that its 1,024
entries hold at about 24 products each. 16 MB a length was measured on a Qwen3 of 2.5 M; 25 meets famc's own fine-tuning runs of
1 and 2.5 M, to which it is fitted. fp32 products compile nothing."""


FUSED_ROWS, FUSED_LOGIT = 512, 8.0
"""A fused loss's rows at once and bytes a logit: 16 bits, fp32, and the gradient in 16 bits (famc.work.loss)."""


@dataclass(frozen=True, slots=True)
class Slack:
    """What no tensor of the model holds: the only fitted constants, see benchmarks/planner_memory.py.

    `fragments`: bytes that PyTorch's allocator reserved over those that tensors held, less one, of what comes and goes
    (activations, logits, gathered weights). `talk`: bytes of gradient buckets and of buffers to send and receive, where
    devices talk. `alone`: workspaces of cuBLAS, on every device.
    """

    fragments: float = 0.05
    talk: float = 0.25e9
    alone: float = 0.3e9


SLACK = Slack()


def step_memory(setup: Setup, *, fullest: bool = False, slack: Slack = SLACK) -> Memory:
    """Bytes at the peak of a training step, by what holds them: on the device whose peak the stack publishes, or `fullest`,
    on that which holds most (the two differ only under pipeline parallelism).

    `weights`: fp32 shards that FSDP casts as it gathers, else the 16-bit copy that computes; `optimizer`: moments, and the
    fp32 master copy beside 16-bit weights. `activations`: of the micro-batches in flight and, where the backward pass is the
    peak, of the block in work; `logits` is 0 there. `overhead`: gathered weights and whole gradients of FSDP, 8-bit copies,
    workspaces, and for stacks that report reserved bytes the allocator's fragments; of a CPU the interpreter.

    ValueError for a layout that does not divide the model: tp not dividing the heads, more stages than layers.
    """
    lay, h = setup.layout, habits(setup.software)
    for s in setup.anatomy.stacks:
        for core in s.block.attentions:
            if core.heads % lay.tp:
                raise Impossible(f"tp {lay.tp} does not divide {core.heads} heads")
    made = stages(setup.anatomy, lay.pp, setup.vpp, lay.grad_accum, h.balanced)
    if not fullest and h.stage != "fullest":
        return _of_stage(setup, made[0 if h.stage == "first" else -1], h, slack)
    return max((_of_stage(setup, s, h, slack) for s in made), key=lambda m: m.total)


def limit(setup: Setup) -> float:
    """Bytes that the framework's allocator can get: the device's memory less CUDA's context and NCCL's buffers; of a host
    the share that is left to one program."""
    device = setup.device
    if device.kind == "cpu":
        return device.usable
    return (device.capacity or device.memory) - CONTEXT - (NCCL if setup.layout.devices > 1 else 0.0)


def fits(setup: Setup) -> bool:
    """Whether the fullest device holds the step, with the model's margin to spare."""
    return step_memory(setup, fullest=True).total <= (1 - MARGIN) * limit(setup)


# --- one stage --------------------------------------------------------------------------------------------


def _of_stage(setup: Setup, stage: Stage, h: Habits, slack: Slack) -> Memory:
    lay, a = setup.layout, setup.anatomy
    w = weights(a, lay.tp, lay.ep)
    b = width(lay.precision)
    ranks = lay.dp_shard * lay.cp
    own = max(1.0, ranks * lay.tp / lay.ep) if lay.ep > 1 else float(ranks)  # data ranks of an expert
    root = (w.below if stage.first else 0.0) + (w.above if stage.last else 0.0)
    ends = root + (w.tied if stage.last and not stage.first else 0.0)
    blocks, experts = w.dense * stage.share, w.experts * stage.share
    if setup.trained is None:
        held = _state(setup, blocks + ends, experts, ends, ranks, own, b, h)
    else:
        held = _frozen_state(setup, blocks + ends + experts, ends, ranks, b, h)
    whole = blocks + experts + ends
    asleep, awake = _gathered(setup, w.block, root, w.above, whole, ranks, b, h.sums)
    waiting, working, tokens = _activations(setup, stage, h, b)
    rows = tokens * a.head_share * a.vocab / lay.tp if stage.last else 0.0  # logits
    if h.keeps_logits and lay.pp > 1:
        # of every micro-batch, and once more where the schedule joins them to what it returns
        waiting += 2.0 * b * rows * lay.grad_accum
    # in fp32 the 16-bit logits are fp32 ones, and so is their gradient: 2 bytes more each
    each = (h.logit_split if lay.tp > 1 else h.logit) + 2.0 * (b - 2)
    logits = rows * each
    if setup.fused_loss:
        logits = min(rows, FUSED_ROWS * a.vocab / lay.tp) * FUSED_LOGIT
    if (
        setup.adapters and setup.frozen_bytes < 1
    ):  # a 4-bit matrix is unpacked, and its transpose, to run back
        awake += 2.0 * b * max(w.matrix, w.above if h.quantised_head else 0.0)
    loss, back = waiting + logits + asleep, waiting + working + awake
    at_loss = loss >= back
    overhead = (asleep if at_loss else awake) + held.overhead + _outside(setup, max(loss, back), h, slack)
    made = replace(
        held,
        activations=waiting + (0.0 if at_loss else working),
        logits=logits if at_loss else 0.0,
        overhead=overhead,
    )
    if h.loads_whole and setup.sharding == "full" and ranks > 1:
        loading = b * (whole * (1 + 1 / ranks) + 2 * w.block + root)
        made = replace(made, overhead=made.overhead + max(0.0, loading - made.total))
    return made


def _outside(setup: Setup, moving: float, h: Habits, slack: Slack) -> float:
    """What no tensor holds; `moving`: bytes of tensors that come and go."""
    if setup.device.kind == "cpu":
        compiled = setup.shapes if setup.shapes > 1 and setup.layout.precision != "fp32" else 0
        return CPU + CPU_SHAPE * min(compiled, CPU_SHAPES)
    fragments = slack.fragments * moving if h.reports == "reserved" else 0.0
    return fragments + slack.alone + (slack.talk if setup.layout.devices > 1 else 0.0)


def _eight_bit(setup: Setup) -> float:
    """Bytes of a matrix's 8-bit copies. Matrix units before Blackwell multiply 8-bit numbers in one order only: a second,
    transposed copy is kept for the backward pass (Transformer Engine). Those that came with 4-bit numbers need none."""
    return 1.0 if any(p == "fp4" for p, _ in setup.device.peaks) else 2.0


def _state(
    setup: Setup, dense: float, experts: float, ends: float, ranks: int, own: float, b: int, h: Habits
) -> Memory:
    """Weights, gradients, moments and 8-bit copies of a model that is trained whole. `ends`: the part of `dense` that is
    tables and head; `ranks`, `own`: data ranks that divide the dense weights and the experts."""
    kind, total, spread = setup.sharding, dense + experts, dense / ranks + experts / own
    grain = float(setup.gradient_bytes if setup.master or b == 4 else b)
    moments = MOMENTS[setup.optimizer] * (1.0 if setup.master else b / 4)
    if kind == "full":
        main = 4.0 if setup.master else float(b)
        return Memory(main * spread, grain * spread, moments * spread)
    low = h.engine and setup.layout.precision in LOW
    compute = _eight_bit(setup) if low and h.low_weights else float(b)
    copies = _eight_bit(setup) * (total - ends) if low and not h.low_weights else 0.0
    master = 4.0 if setup.master and b < 4 else 0.0
    grain += b if h.copies and b < grain else 0.0
    return Memory(
        weights=compute * (total - ends) + b * ends,
        gradients=grain * (spread if kind == "gradients" else total),
        optimizer=(master + moments) * (total if kind == "none" else spread),
        overhead=copies,
    )


def _frozen_state(setup: Setup, total: float, ends: float, ranks: int, b: int, h: Habits) -> Memory:
    """The same where most weights are frozen: those keep no gradient, moments or master copy."""
    lay, kind = setup.layout, setup.sharding
    trained = (setup.trained or 0) / (lay.tp * lay.pp)
    frozen = total if setup.adapters else max(0.0, total - trained)
    one = setup.frozen_bytes if setup.frozen_bytes < 1 else float(b)
    if h.engine and h.low_weights and lay.precision in LOW:
        one = _eight_bit(setup)
    wide = min(frozen, 0.0 if h.quantised_head and setup.frozen_bytes < 1 else ends)
    shard = ranks if kind == "full" else 1
    grain = float(setup.gradient_bytes if setup.master or b == 4 else b)
    moments = MOMENTS[setup.optimizer] * (1.0 if setup.master else b / 4)
    master = 4.0 if setup.master and b < 4 else 0.0
    return Memory(
        weights=((frozen - wide) * one + wide * b + trained * b) / shard,
        gradients=trained * grain / (ranks if kind in ("full", "gradients") else 1),
        optimizer=trained * (master + moments) / (1 if kind == "none" else ranks),
    )


def _gathered(
    setup: Setup, block: float, root: float, head: float, whole: float, ranks: int, b: int, sums: bool
) -> tuple[float, float]:
    """Bytes of whole weights and gradients that pass through a device that keeps shards: (at the loss, in the backward
    pass).

    FSDP gathers the next block while one is in use and keeps the root's; a block's gradients are whole, once in 16 bits and
    once in the width that they are summed in, until they are scattered (Zhao et al. 2023, arXiv:2304.11277, section 3.3).
    Under pipeline parallelism a stage stays whole for all micro-batches, and so do its gradients (torchtitan's
    reshard_after_forward). Where nothing is sharded, autocast keeps a 16-bit copy of fp32 weights for the step.
    """
    if ranks == 1 or setup.sharding not in ("full", "gradients"):
        cast = setup.sharding == "full" and setup.trained is None and setup.master and b < 4
        return (whole * b,) * 2 if cast else (0.0, 0.0)
    summed = setup.gradient_bytes if sums and setup.gradient_bytes > b else 0
    grain = 0.0 if setup.adapters else float(b + summed)
    if setup.sharding == "gradients":
        return 0.0, block * grain
    wide = setup.frozen_bytes if setup.adapters and setup.frozen_bytes < 1 else float(b)
    if setup.layout.pp > 1:
        return (whole * (wide + (0.0 if setup.adapters else setup.gradient_bytes)),) * 2
    above = 0.0 if setup.adapters else head * b  # its gradient waits for the root's
    return (block + root) * wide, (2 * block + root) * wide + block * grain + above


# --- activations ------------------------------------------------------------------------------------------


def _activations(setup: Setup, stage: Stage, h: Habits, b: int) -> tuple[float, float, float]:
    """Bytes (waiting for their backward pass, of the block in work) and the tokens of a micro-batch on one device."""
    lay = setup.layout
    mode = _mode(
        setup.software, lay.precision, lay.tp, lay.ep, setup.sequence_parallel, setup.adapted if setup.adapters else "",
        setup.adapters and setup.frozen_bytes < 1,
    )  # fmt: skip
    way = _way(setup)
    if setup.device.kind == "cpu" and (setup.document or setup.seq_len) <= EAGER_CONTEXT:  # eager attention
        mode = replace(mode, scores=True)
    # recomputing the core alone spares its scores, which flash attention never writes
    bare = replace(mode, scores=False) if way == "core" and mode.scores else mode
    tokens = lay.micro_batch * setup.seq_len / lay.cp
    waiting = working = 0.0
    for s in setup.anatomy.stacks:
        if not s.share:
            continue
        keys, rows = _keys(s, setup.document or setup.seq_len), tokens * s.share
        source = s.source / s.share
        run, saved = kept(s.block, keys, mode, source), kept(s.block, keys, bare, source)
        each = saved.input if way == "full" else saved.half if way == "half" else saved.whole
        waiting += s.layers * rows * each
        again = run.whole if way in ("full", "half") else run.whole - each
        working = max(working, rows * (again + run.work))
    waiting *= stage.share * stage.flight
    if stage.last and setup.anatomy.stacks:
        # the last norm's input; its output, whole where tensor ranks gather it for the head
        one = b * tokens * setup.anatomy.stacks[-1].block.hidden
        waiting += one * (1 + 1 / (lay.tp if setup.sequence_parallel else 1))
    return waiting, working, tokens


def _way(setup: Setup) -> str:
    how = setup.layout.recompute
    if how == "selective":
        return practice(setup.software).selective
    if how not in ("none", "full"):
        raise ValueError(f"recompute {how!r}: choose none, selective or full")
    return how


@lru_cache(maxsize=16384)
def _mode(
    software: Software, precision: str, tp: int, ep: int, sequence: bool, adapted: Adapted, quantised: bool
) -> Mode:
    p, h = practice(software), habits(software)
    scores = p.attention == "scores"
    return Mode(
        width(precision), tp, ep, sequence, norms=h.norms or p.fused >= 0.5, gates=p.fused >= 0.75,
        low=h.engine and precision in LOW, scores=scores, dropout=scores, base=h.base, adapted=adapted, quantised=quantised,
    )  # fmt: skip


def _keys(stack: Stack, seq_len: int) -> float:
    """Keys that a row of attention's scores spans, at most."""
    own = stack.share * seq_len if stack.length is None else float(stack.length)
    if not any(core.cross for core in stack.block.attentions):
        return own
    return max(own, stack.source * seq_len if stack.source_length is None else float(stack.source_length))
