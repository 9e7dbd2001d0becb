"""The ways in which a model can be spread over a number of devices, without micro-batch and recomputation.

In: a Wanted and forced degrees. Out: Spreads; ValueError for what cannot be at all. Bears no identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from famc.cost.anatomy import Anatomy
from famc.cost.device import Device, Impossible
from famc.cost.matmul import best
from famc.cost.setup import Sharding, Software

FORCEABLE = (
    "devices", "nodes", "dp", "dp_replicate", "dp_shard", "tp", "cp", "pp", "vpp", "ep", "micro_batch", "grad_accum", "recompute",
)  # fmt: skip
RECOMPUTES = ("none", "selective", "full")
RUNTIMES = ("accelerate", "any")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "fp8", "mxfp8", "fp8-rowwise", "nvfp4")
MEGATRON = ("megatron-lm", "megatron-deepspeed", "nemo", "megatron-bridge", "mlperf")
"""Software that divides the optimizer's state alone over data ranks (ZeRO-1); others divide all of it (FSDP)."""
HERE = Software()
MOST_TP = 16
MOST_PP = 64
LEAST_CONTEXT = {"accelerate": 4096, "any": 1024}
"""Tokens of a sequence that a context rank keeps at least, by runtime: below them PyTorch's ring is all latency, and others'
is not found in published layouts."""
STEP = 1.19
"""Numbers of devices nearer than this ratio are not told apart: the search looks at the larger one."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A training step whose layout is searched for, on up to `nodes` x `per_node` devices. See Setup for what is not told here.

    `global_batch`: sequences of `seq_len` tokens a step, or groups of `rows` such that stay together (a preference pair: 2).
    `precision`: of the step; `auto`: 16 bits, and with runtime `any` 8 bits where the device has them and they are faster.
    `runtime`: `accelerate` runs HSDP, tensor and context parallelism; `any` may also plan pipelines and expert parallelism.
    `sharding`: what dp_shard divides, None: as the software does it. `beside`: frozen 16-bit weights of other models that
    are held and divided like the model's (DPO's reference, a teacher). `recomputes`: those that the trainer knows.
    """

    anatomy: Anatomy
    device: Device
    seq_len: int
    global_batch: int
    nodes: int = 1
    per_node: int = 8
    precision: str = "auto"
    runtime: Literal["accelerate", "any"] = "accelerate"
    software: Software = HERE
    sharding: Sharding | None = None
    optimizer: Literal["adamw", "adamw_8bit", "muon", "sgd"] = "adamw"
    trained: int | None = None
    adapters: bool = False
    adapted: Literal["attention", "all", "prefix", "outputs"] = "all"
    frozen_bytes: float = 2.0
    gradient_bytes: int = 4
    master: bool = True
    fused_loss: bool = False
    shapes: int = 1
    document: int | None = None
    rows: int = 1
    beside: int = 0
    recomputes: tuple[str, ...] = RECOMPUTES


class Spread(NamedTuple):
    """Degrees of parallelism; `data` ranks read different sequences, and groups of `shards` of them, any of these, may
    divide the state."""

    devices: int
    tp: int
    cp: int
    pp: int
    vpp: int
    ep: int
    data: int
    shards: tuple[int, ...]


Forced = Mapping[str, int | str]


def check(w: Wanted, forced: Forced) -> None:
    """ValueError, with the numbers, for what no layout can have: sizes below 1, degrees that do not divide the model."""
    for name in ("seq_len", "global_batch", "nodes", "per_node", "rows"):
        if getattr(w, name) < 1:
            raise Impossible(f"{name} is {getattr(w, name)}: it must be at least 1")
    if w.runtime not in RUNTIMES:
        raise Impossible(f"runtime {w.runtime!r}: choose {' or '.join(RUNTIMES)}")
    for name, value in forced.items():
        if name not in FORCEABLE:
            raise Impossible(f"layout has no settable {name!r}: choose from {', '.join(FORCEABLE)}")
        if name == "recompute":
            if value not in RECOMPUTES:
                raise Impossible(f"recompute {value!r}: choose {', '.join(RECOMPUTES)}")
        elif not isinstance(value, int) or value < 1:
            raise Impossible(f"{name} is {value}: it must be a whole number of at least 1")
    if w.precision not in PRECISIONS:
        raise Impossible(f"precision {w.precision!r}: choose {', '.join(PRECISIONS)}")
    if w.precision != "auto":
        best(w.device, w.precision)  # raises where the device has no such precision
    tp, cp, pp, ep = (int(forced.get(name, 1)) for name in ("tp", "cp", "pp", "ep"))
    for core in (a for s in w.anatomy.stacks for a in s.block.attentions):
        if core.heads % tp:
            raise Impossible(f"tp {tp} does not divide the {core.heads} heads of {w.anatomy.name}")
        if core.kv_heads % tp and (w.runtime == "accelerate" or tp % core.kv_heads):
            raise Impossible(
                f"tp {tp} does not divide the {core.kv_heads} key/value heads of {w.anatomy.name}"
            )
    if pp > layers(w.anatomy):
        raise Impossible(f"pp {pp} is more than the {layers(w.anatomy)} layers of {w.anatomy.name}")
    if w.seq_len % cp:
        raise Impossible(f"cp {cp} does not divide sequences of {w.seq_len} tokens")
    number = experts(w.anatomy)
    if ep > 1 and (not number or number % ep):
        raise Impossible(f"ep {ep} does not divide the {number} experts of {w.anatomy.name}")
    if w.runtime == "accelerate":
        for name, value in (("pp", pp), ("ep", ep), ("vpp", int(forced.get("vpp", 1)))):
            if value > 1:
                raise Impossible(f"{name} {value}: the runtime accelerate has none; runtime any can plan it")
    if w.device.kind == "cpu":
        for name in ("devices", "nodes", "dp", "dp_replicate", "dp_shard", "tp", "cp", "pp", "ep", "vpp"):
            if int(forced.get(name, 1)) > 1:
                raise Impossible(
                    f"{name} {forced[name]}: {w.device.name} is one host, where a step is one process"
                )
    most = w.nodes * w.per_node
    if int(forced.get("devices", 1)) > most:
        raise Impossible(f"devices {forced['devices']}: there are {w.nodes} x {w.per_node} = {most}")
    if int(forced.get("nodes", 1)) > w.nodes:
        raise Impossible(f"nodes {forced['nodes']}: there are {w.nodes}")
    micro, model = int(forced.get("micro_batch", 1)), tp * cp * pp
    if model > most:
        raise Impossible(
            f"tp {tp} x cp {cp} x pp {pp} is {model} devices: there are {w.nodes} x {w.per_node}"
        )
    data = int(forced.get("dp", int(forced.get("dp_replicate", 1)) * int(forced.get("dp_shard", 1))))
    if "devices" in forced and all(name in forced for name in ("tp", "cp", "pp")):
        devices = int(forced["devices"])
        if devices % model:
            raise Impossible(f"tp {tp} x cp {cp} x pp {pp} = {model} does not divide {devices} devices")
        data = devices // model
    each = micro * int(forced.get("grad_accum", 1))
    if w.global_batch % (data * each):
        parts = f"{data} data ranks x micro-batch {micro}" + (
            f" x {each // micro} accumulated" if each > micro else ""
        )
        raise Impossible(f"a global batch of {w.global_batch} is not divisible by {parts}")


def layers(a: Anatomy) -> int:
    """Blocks of all stacks."""
    return sum(s.layers for s in a.stacks)


def experts(a: Anatomy) -> int:
    """Experts of a mixture, 0 where there is none."""
    return max((x.copies for s in a.stacks for x in s.block.linears if x.copies > 1), default=0)


def precisions(w: Wanted) -> tuple[str, ...]:
    """Those to look at. ValueError where the device does not have the one that is asked for."""
    peaks = dict(w.device.peaks)
    if w.precision != "auto":
        return (w.precision,)
    half = next((p for p in ("bf16", "fp16") if p in peaks), "fp32")
    return (half, "fp8") if w.runtime == "any" and "fp8" in peaks and half != "fp32" else (half,)


def counts(w: Wanted, forced: Forced) -> list[int]:
    """Numbers of devices to look at, ascending: powers of two inside of a node; whole nodes, as many as there are, powers
    of two, and what divides the batch."""
    most = w.nodes * w.per_node
    if "devices" in forced:
        return [int(forced["devices"])]
    model = 1
    for name in ("tp", "cp", "pp"):
        model *= int(forced.get(name, 1))
    if "dp_shard" in forced and "dp_replicate" in forced and all(n in forced for n in ("tp", "cp", "pp")):
        return [model * int(forced["dp_shard"]) * int(forced["dp_replicate"])]
    inside = {2**i for i in range(8) if 2**i <= w.per_node} | {w.per_node, model}
    around = {2**i for i in range(20) if 2**i <= w.nodes} | {w.nodes}
    around |= {n for n in range(1, min(w.nodes, w.global_batch) + 1) if w.global_batch % n == 0}
    if "nodes" in forced:
        n = int(forced["nodes"])
        found = {n * w.per_node} if n > 1 else inside
    else:
        found = inside | {n * w.per_node for n in around}
    kept: list[int] = []
    for count in sorted((c for c in found if c <= most and c % model == 0), reverse=True):
        exact = count & (count - 1) == 0
        if not kept or exact or kept[-1] >= STEP * count:
            kept.append(count)
    return kept[::-1]


def spreads(w: Wanted, forced: Forced, devices: int) -> Iterator[Spread]:
    """All that `devices` devices allow: the batch divides evenly, heads, experts and sequences too."""
    a, total = w.anatomy, layers(w.anatomy)
    number = experts(a)
    micro = int(forced.get("micro_batch", 1)) * int(forced.get("grad_accum", 1))
    whole = is_whole(w)
    for tp in _tps(w, forced):
        for cp in _cps(w, forced):
            for pp in _pps(w, forced, total):
                model = tp * cp * pp
                if devices % model:
                    continue
                data = devices // model
                if w.global_batch % (data * micro) or int(forced.get("dp", data)) != data:
                    continue
                shards = _shards(w, forced, data, model, whole)
                for ep in _eps(w, forced, number):
                    some = tuple(s for s in shards if s * cp * tp % ep == 0)
                    for vpp in _vpps(forced, total, pp, w.global_batch // data) if some else ():
                        yield Spread(devices, tp, cp, pp, vpp, ep, data, some)


def is_whole(w: Wanted) -> bool:
    """Whether weights stay whole on each data rank."""
    return (w.sharding or ("optimizer" if w.software.name in MEGATRON else "full")) in ("none", "optimizer")


def _tps(w: Wanted, forced: Forced) -> list[int]:
    if "tp" in forced:
        return [int(forced["tp"])]
    cores = [(a.heads, a.kv_heads) for s in w.anatomy.stacks for a in s.block.attentions]
    most = min(w.per_node, MOST_TP)
    return [t for t in _powers(most) if all(h % t == 0 and kv % t == 0 for h, kv in cores)]


def _cps(w: Wanted, forced: Forced) -> list[int]:
    """Rings need causal attention of whole sequences: no documents inside of them, and no windows."""
    if "cp" in forced:
        return [int(forced["cp"])]
    cores = [a for s in w.anatomy.stacks for a in s.block.attentions]
    ring = all(a.causal and not a.cross and a.flash and a.window is None for a in cores)
    if not cores or not ring or w.document is not None or w.rows > 1:
        return [1]
    least = LEAST_CONTEXT[w.runtime]
    return [c for c in _powers(64) if c == 1 or (w.seq_len // c >= least and w.seq_len % (2 * c) == 0)]


def _pps(w: Wanted, forced: Forced, total: int) -> list[int]:
    if "pp" in forced:
        return [int(forced["pp"])]
    alike = len({s.part for s in w.anatomy.stacks}) == 1
    if w.runtime == "accelerate" or not alike:
        return [1]
    even = [p for p in range(1, min(total, MOST_PP) + 1) if total % p == 0]
    return sorted({*even, *(p for p in _powers(MOST_PP) if p <= total // 2)})


def _shards(w: Wanted, forced: Forced, data: int, model: int, whole: bool) -> list[int]:
    """Data ranks that divide the state: one, those of a node, of several nodes, all."""
    if "dp_shard" in forced:
        return [int(forced["dp_shard"])] if data % int(forced["dp_shard"]) == 0 else []
    if "dp_replicate" in forced:
        replicas = int(forced["dp_replicate"])
        return [data // replicas] if data % replicas == 0 else []
    if whole:
        return [data]
    inside = max(1, w.per_node // model)
    some = {1, data} | {inside * k for k in (1, 2, 4, 8, 16)}
    return sorted(s for s in some if s <= data and data % s == 0)


def _eps(w: Wanted, forced: Forced, number: int) -> list[int]:
    if "ep" in forced:
        return [int(forced["ep"])]
    if w.runtime == "accelerate" or not number:
        return [1]
    return [e for e in _powers(64) if number % e == 0]


def _vpps(forced: Forced, total: int, pp: int, each: int) -> list[int]:
    """Chunks of a rank: one, or the most that divide the layers, or these with embedding and head as two more;
    interleaving needs a round of micro-batches for each stage."""
    if "vpp" in forced:
        return [int(forced["vpp"])]
    if pp == 1 or each % pp:
        return [1]
    whole = (total, total + 2)
    most = next((v for v in range(whole[1] // pp, 1, -1) if any(n % (pp * v) == 0 for n in whole)), 1)
    return [1] if most == 1 else [1, most]


def _powers(most: int) -> list[int]:
    return [2**i for i in range(12) if 2**i <= most]
