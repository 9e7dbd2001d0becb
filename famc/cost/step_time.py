"""Seconds of one optimizer step on GPUs or TPUs: what a device computes, what moves between devices, what waits.

In: a Setup. Out: a StepTime, whose parts add up to its seconds. **Modelled**: a roofline by part with the constants of
fitted.json; how far it is off is what benchmarks/planner.py prints. Bears no identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from famc.cost import comm, matmul, sums
from famc.cost.anatomy import Anatomy, Block
from famc.cost.device import Impossible
from famc.cost.fitted import Constants, band, constants
from famc.cost.kernels import Pass, Work, block, head
from famc.cost.setup import Setup
from famc.cost.software import Practice, practice

LAUNCH = {"eager": 1.0, "graph": 0.3, "native": 0.1}
"""Seconds to start a kernel, for one that Python starts. Assumed: compiled code still runs Python between its graphs."""
RESTORE = 4e-4
"""Seconds a block of PyTorch's checkpointing: random states of CPU and device kept, set and set back. Assumed."""
RING_FLOOR = 0.1
"""Share of a context ring's traffic that never hides: the first hop. Assumed."""
BOUNDARY = 0.3
"""Share of a pipeline's traffic between stages that shows where chunks interleave and the stack overlaps it. Assumed."""
BACKWARD = 0.6
"""Share of a micro-batch behind which gradients that are reduced once can move: the backward pass. Assumed."""
STATE = {"adamw": 8.0, "adamw_8bit": 2.0, "muon": 4.0, "sgd": 0.0}
"""Bytes of moments a weight."""
UPDATE_KERNELS = 20.0
"""Kernels of the update for each block (foreach kernels take many weights at once)."""
BASE_YEAR = 2025.0
"""Year whose software the constants describe."""
EACH_MICRO = ("tensor", "context", "expert")
"""Kinds of communication that every micro-batch has; the others are counted for the step."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """`seconds` is the sum of the parts below it, of a device on an average pipeline stage. `communication`: seconds by kind
    that nothing hides. `bubble`: the pipeline filling and waiting for its slowest stage. `overhead`: stragglers, and what a
    step costs besides. `interval`: 90 % of published measurements lay in such a band around a prediction.

    FLOPs are of the whole step on all devices; `mfu`: model FLOPs over the peak at 16 bits, so that it can pass 1 at 4 bits.
    """

    seconds: float
    matmul: float
    attention: float
    vector: float
    launch: float
    communication: tuple[tuple[str, float], ...]
    bubble: float
    optimizer: float
    overhead: float
    interval: tuple[float, float]
    model_flops: float
    hardware_flops: float
    mfu: float


def step_time(setup: Setup, c: Constants | None = None) -> StepTime:
    """The time of one step of `setup` with the fitted constants, or those given.

    ValueError where the device has no such precision, or the layout more pipeline stages than layers.
    """
    c = c or constants()
    lay, p, w, a = setup.layout, practice(setup.software), _work(setup, c), _sums(setup.anatomy)
    forward, backward, layers = Pass(), Pass(), a.layers
    for s in setup.anatomy.stacks:
        if s.share:
            f, b = block(s, w)
            forward.add(f, s.layers)
            backward.add(b, s.layers)
    if lay.pp > max(layers, 1):
        raise Impossible(f"pp {lay.pp} is more than the {layers} layers of {setup.anatomy.name}")
    micro, here = lay.grad_accum, layers / lay.pp

    # one micro-batch on an average stage, and the head, which lies on the last one
    stage = Pass()
    stage.add(forward, (1.0 + _again(setup, p)) / lay.pp)
    stage.add(backward, 1.0 / lay.pp)
    if lay.recompute == "selective" and p.selective == "core" and p.attention == "scores":
        stage.attention += forward.attention / lay.pp
    last = Pass()
    last.add(head(setup.anatomy, w), 2.0 + w.trained if setup.trained is None or not setup.adapters else 2.0)
    start = c.launch * LAUNCH[p.launch]
    eager = start * (stage.kernels + last.kernels / lay.pp)
    if lay.recompute == "full" and p.launch == "eager":
        eager += RESTORE * here
    busy = stage.busy + last.busy / lay.pp
    launch = _queue(busy, eager) - busy

    exposed = _each_micro(setup, a, p, c, w, stage.attention)
    average = busy + launch + sum(exposed.values())
    slowest = average + _slower(setup, layers, stage.busy, last.busy)

    # the whole step; traffic is summed before the pace of software and stragglers are applied
    waits = (lay.pp - 1) * average / setup.vpp + micro * (slowest - average)
    once = _once(setup, a, p, c, w, micro * (busy + launch))
    pace = (1.0 + c.progress) ** (BASE_YEAR - setup.software.year)
    kinds = {k: pace * v * (micro if k in EACH_MICRO else 1) for k, v in (exposed | once).items()}
    n = micro * pace
    parts = (
        n * (stage.matmul + last.matmul / lay.pp),
        n * stage.attention,
        n * (stage.vector + last.vector / lay.pp),
        n * launch,
    )
    running = sum(parts) + sum(kinds.values()) + pace * waits
    nodes = max(1.0, lay.devices / setup.per_node)
    drag = (1.0 + c.straggler) ** math.log2(nodes) - 1.0
    update = _update(setup, a, c)
    total = running * (1.0 + drag) + update + c.step
    low, high = band()
    model, hardware = _flops(setup, a, p, w)
    return StepTime(
        total,
        *parts,
        tuple(kinds.items()),
        pace * waits,
        update,
        running * drag + c.step,
        (total * low, total * high),
        model,
        hardware,
        model / (total * lay.devices * _peak(setup)),
    )


# --- what a device computes -------------------------------------------------------------------------------


def _work(setup: Setup, c: Constants) -> Work:
    lay, d = setup.layout, setup.device
    base = lay.precision if lay.precision in ("fp16", "fp32") else "bf16"
    plain = matmul.rate(d, base, c)
    trained = 1.0
    if setup.trained is not None:
        trained = 0.0 if setup.adapters else min(1.0, setup.trained / _sums(setup.anatomy).parameters)
    return Work(
        device=d,
        practice=practice(setup.software),
        c=c,
        rows=lay.micro_batch * setup.seq_len / lay.cp,
        seq_len=float(setup.seq_len),
        document=float(setup.document or setup.seq_len),
        tp=lay.tp,
        cp=lay.cp,
        ep=lay.ep,
        tp_vectors=lay.tp if setup.sequence_parallel else 1,
        precision=lay.precision,
        plain=plain,
        low=matmul.rate(d, lay.precision, c) if lay.precision in matmul.LOW else plain,
        core=matmul.best(d, base),
        vector=d.bandwidth * c.vector,
        trained=trained,
        adapted=setup.adapted if setup.adapters else "",
        packed=setup.frozen_bytes if setup.adapters and setup.frozen_bytes < 2.0 else 0.0,
        fused_loss=setup.fused_loss,
    )


def _again(setup: Setup, p: Practice) -> float:
    """Share of the forward pass that is run again for the backward one."""
    if setup.layout.recompute == "full":
        return 1.0
    return 0.5 if setup.layout.recompute == "selective" and p.selective == "half" else 0.0


def _queue(device: float, host: float) -> float:
    """Seconds of a device that `host` seconds of starting kernels feed: the longer of both, and a little more where they
    are alike, since the queue then runs empty now and then."""
    return float((device**4 + host**4) ** 0.25)


def _slower(setup: Setup, layers: int, stage: float, last: float) -> float:
    """Seconds a micro-batch takes longer on the slowest stage than on average. Chunks hold whole layers; one that holds
    fewer than the others leaves room for the head."""
    pp, chunks = setup.layout.pp, setup.layout.pp * setup.vpp
    if pp == 1:
        return 0.0
    if layers % chunks == 0:
        return last * (1 - 1 / pp)
    uneven = -(-layers // chunks) * chunks / layers
    return max(0.0, stage * (uneven - 1.0) - last / pp)


# --- what moves -------------------------------------------------------------------------------------------


def _each_micro(
    setup: Setup, a: _Sums, p: Practice, c: Constants, w: Work, attention: float
) -> dict[str, float]:
    """Exposed seconds a micro-batch on an average stage, by kind.

    tensor: two exchanges a block forward, two backward (Shoeybi et al. 2019, arXiv:1909.08053), two more if the forward runs
    again, and half of one for the inputs that sequence parallelism gathers anew (Korthikanti et al. 2022, arXiv:2205.05198).
    context: keys and values pass a ring, forward once and backward with their gradients (Liu et al. 2023, arXiv:2310.01889).
    expert: a token goes to its experts and back, forward and backward.
    """
    lay, d, out = setup.layout, setup.device, {}
    again = 1.0 if lay.recompute == "full" else 0.0
    if lay.tp > 1:
        over = comm.link(d, lay.tp, 1, setup.per_node)
        passes = 2.0 + again + (0.5 if setup.sequence_parallel else 0.0)
        calls = a.exchanges / lay.pp
        moved = (
            comm.all_reduce(2.0 * w.rows * a.exchanged / lay.pp, over) + max(0.0, calls - 1) * over.latency
        )
        out["tensor"] = passes * moved * (1.0 - (c.hide_tensor if p.overlap_tensor else 0.0))
    if lay.cp > 1:
        over = comm.link(d, lay.cp, lay.tp, setup.per_node)
        hop = 2.0 * w.rows * a.keys / lay.tp / over.rate + a.layers * over.latency / lay.cp
        moved = (3.0 + again) * (lay.cp - 1) * hop / lay.pp
        out["context"] = max(RING_FLOOR * moved, moved - c.hide_data * attention)
    if lay.ep > 1 and a.routed_layers:
        out["expert"] = 4.0 * _routed(setup, a, w) * (1.0 - (c.hide_expert if p.overlap_tensor else 0.0))
    return out


def _routed(setup: Setup, a: _Sums, w: Work) -> float:
    """Seconds of one exchange between experts. Tokens go at the precision of the products and come back at 16 bits."""
    lay, d = setup.layout, setup.device
    over = comm.link(d, lay.ep, lay.tp, setup.per_node)
    local = max(1, min(lay.ep, setup.per_node // lay.tp))
    places = -(-lay.ep // local) if over.spans else lay.ep
    width = 1.5 if lay.precision in matmul.LOW else 2.0
    size = w.rows * width * sum(wide * comm.distinct(active, places) for wide, active in a.routed)
    moved = comm.all_to_all(size / lay.pp / lay.tp, d, over, local)
    return moved + max(0.0, a.routed_layers / lay.pp - 1) * over.latency


def _once(setup: Setup, a: _Sums, p: Practice, c: Constants, w: Work, compute: float) -> dict[str, float]:
    """Exposed seconds a step of the pipeline's boundaries and of data parallelism."""
    lay, d, out = setup.layout, setup.device, {}
    if lay.pp > 1:
        inside = lay.devices <= setup.per_node
        width = setup.anatomy.stacks[-1].block.hidden
        one = comm.point_to_point(2.0 * w.rows * width / w.tp_vectors, d, inside)
        shown = BOUNDARY if p.overlap_data and setup.vpp > 1 else 1.0
        out["pipeline"] = 2.0 * one * setup.vpp * lay.grad_accum * shown
    data = _data_parallel(setup, a, p, c, compute)
    if data:
        out["data"] = data
    return out


def _held(setup: Setup, a: _Sums) -> tuple[float, float]:
    """(weights, trained weights) of an average device before data parallelism divides them."""
    shards = setup.layout.tp * setup.layout.pp
    held = (a.weights + a.expert_weights / setup.layout.ep) / shards
    return held, held if setup.trained is None else setup.trained / shards


def _data_parallel(setup: Setup, a: _Sums, p: Practice, c: Constants, compute: float) -> float:
    """Exposed seconds a step of gradients reduced and weights gathered.

    Fully sharded: weights gathered twice a micro-batch and gradients scattered (Zhao et al. 2023, arXiv:2304.11277); with a
    pipeline the weights stay gathered and the gradients are scattered once. ZeRO-1 and -2: scattered once, or for each
    micro-batch, and weights gathered once (Rajbhandari et al. 2019, arXiv:1910.02054). Replicas: all-reduced.
    """
    lay, d, micro = setup.layout, setup.device, setup.layout.grad_accum
    held, trained = _held(setup, a)
    sharded = lay.dp_shard * lay.cp
    each = p.reduce_each and setup.sharding in ("full", "gradients") and lay.pp == 1
    times, gathers = (micro if each else 1), (micro if lay.pp == 1 else 1)
    over = comm.link(d, sharded, lay.tp, setup.per_node)
    width = 1.0 if lay.precision in matmul.LOW else 2.0
    total, behind, calls = 0.0, compute, a.layers / lay.pp
    if sharded > 1:
        scatter = comm.all_gather(setup.gradient_bytes * trained, over)
        if setup.sharding == "full":
            more = (calls - 1) * over.latency
            total = 2.0 * gathers * (comm.all_gather(width * held, over) + more) + times * (scatter + more)
            calls *= micro
        elif setup.sharding == "none":
            total = comm.all_reduce(setup.gradient_bytes * trained, over)
            behind = BACKWARD * compute / micro
        else:
            total = times * scatter + comm.all_gather(width * trained, over)
            behind = compute / micro
    if lay.dp_replicate > 1:
        outer = comm.link(d, lay.dp_replicate, lay.tp * sharded, setup.per_node)
        total += times * comm.all_reduce(setup.gradient_bytes * trained / sharded, outer)
    if not total or not p.overlap_data:
        return total
    first = total / max(1.0, calls)
    return max(first, total - c.hide_data * behind) + c.contention * min(total, behind)


# --- the rest ---------------------------------------------------------------------------------------------


def _update(setup: Setup, a: _Sums, c: Constants) -> float:
    """Seconds of the optimizer: moments read and written, gradients read twice (norm, update), master and working weights."""
    lay = setup.layout
    _, trained = _held(setup, a)
    if setup.sharding != "none":
        trained /= lay.dp_shard * lay.cp
    touched = 2 * STATE[setup.optimizer] + 2.0 * setup.gradient_bytes + (8.0 if setup.master else 4.0) + 2.0
    moved = c.optimizer * touched * trained / setup.device.bandwidth
    return moved + UPDATE_KERNELS * a.layers / lay.pp * c.kernel


def _flops(setup: Setup, a: _Sums, p: Practice, w: Work) -> tuple[float, float]:
    """(model, hardware) FLOPs of a step: forward x 3, x 2 where nothing but adapters is trained; with what runs again."""
    tokens = float(setup.layout.global_batch * setup.seq_len)
    products = tokens * a.products
    core = sums.attention_flops(setup.anatomy, tokens, min(setup.seq_len, w.document))
    model = (2.0 + w.trained) * products + 3.0 * core
    return model, model + _again(setup, p) * (products - tokens * a.head + core)


def _peak(setup: Setup) -> float:
    peaks = dict(setup.device.peaks)
    return peaks.get("bf16") or peaks.get("fp16") or setup.device.peak("fp32")


@dataclass(frozen=True, slots=True)
class _Sums:
    """What a step needs of a model besides its blocks. `exchanges`, `exchanged`: sums over tensor-parallel ranks, and the
    numbers a token in them; `keys`: numbers a token of keys and values; `routed`: (numbers a token, active experts) of each
    mixture; `products`, `head`: forward FLOPs a token."""

    layers: int
    exchanges: float
    exchanged: float
    keys: float
    routed: tuple[tuple[float, int], ...]
    routed_layers: int
    weights: float
    expert_weights: float
    products: float
    head: float
    parameters: int


_known: dict[int, tuple[Anatomy, _Sums]] = {}
_MOST = 4096


def _sums(a: Anatomy) -> _Sums:
    """Kept by identity: to hash a whole anatomy takes as long as to price a step. Each entry holds its anatomy, so that no
    other can get its address."""
    found = _known.get(id(a))
    if found is not None:
        return found[1]
    if len(_known) >= _MOST:
        _known.clear()
    made = _summed(a)
    _known[id(a)] = (a, made)
    return made


def _summed(a: Anatomy) -> _Sums:
    stacks = [s for s in a.stacks if s.share]
    mixtures = [(s, x) for s in stacks for x in s.block.linears if x.copies > 1]
    routed = {id(s): (s, x) for s, x in mixtures}.values()
    inside = sum(float(s.layers * x.weights) for s in a.stacks for x in s.block.linears if x.copies == 1)
    tables = sum(t.weights for t in a.tables) + (a.head.weights if a.head else 0)
    head = a.head if a.head is not None else next((t for t in a.tables if t.head), None)
    return _Sums(
        layers=sum(s.layers for s in stacks),
        exchanges=float(sum(s.layers * _exchanges(s.block) for s in stacks)),
        exchanged=sum(s.layers * s.share * s.block.hidden * _exchanges(s.block) for s in stacks),
        keys=sum(s.layers * s.share * _kv(s.block) for s in stacks),
        routed=tuple((s.layers * s.share * s.block.hidden, x.active) for s, x in routed),
        routed_layers=sum(s.layers for s, _ in routed),
        weights=inside + tables + sum(x.weights for x in a.linears),
        expert_weights=float(sum(s.layers * x.weights for s, x in mixtures)),
        products=sums.matmul_flops(a, 1.0),
        head=2.0 * a.head_share * head.weights if head is not None else 0.0,
        parameters=sums.parameters(a),
    )


def _exchanges(b: Block) -> int:
    """Sums over tensor-parallel ranks in a block's forward: one for each output that the ranks share; attention and
    feed-forward side by side need one for both."""
    rows = sum(1 for x in b.linears if x.split == "row" and not x.name.startswith("shared"))
    return max(1, rows - 1) if b.parallel else rows


def _kv(b: Block) -> int:
    return sum(x.kv_heads * (x.qk_dim + x.v_dim) for x in b.attentions)
