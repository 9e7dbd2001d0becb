"""How a model is spread over devices, and a greedy search whose every decision leaves its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from famc.cost import memory
from famc.cost.device import Device
from famc.cost.memory import Memory
from famc.cost.parameters import count
from famc.cost.shape import Shape

Forced = tuple[tuple[str, int | str], ...]

FORCEABLE = (
    "devices",
    "nodes",
    "dp_replicate",
    "dp_shard",
    "tp",
    "cp",
    "pp",
    "ep",
    "micro_batch",
    "recompute",
)
MICRO_TOKENS = {"gpu": 32768, "cpu": 8192}
"""A larger micro-batch no longer speeds the matmuls up and only takes memory. Assumed."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`devices` counts all of them, over all `nodes`: dp_replicate x dp_shard x tp x cp x pp. Experts (`ep`)
    live on ranks of dp_shard. `micro_batch` x `grad_accum` x dp_replicate x dp_shard sequences make the
    global batch."""

    nodes: int = 1
    devices: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    micro_batch: int = 1
    grad_accum: int = 1
    recompute: str = "none"
    precision: str = "bf16"
    why: tuple[str, ...] = ()

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def global_batch(self) -> int:
        """Sequences an optimizer step."""
        return self.micro_batch * self.grad_accum * self.data


class DoesNotFit(Exception):
    """No layout fits. `biggest` names the largest part of the leanest `memory`; `hint`: what to change."""

    def __init__(self, biggest: str, hint: str, memory: Memory, limit: float) -> None:
        self.biggest = biggest
        self.hint = hint
        self.memory = memory
        self.limit = limit
        super().__init__(f"needs {_gb(memory.total)} a device of {_gb(limit)}, most of it {biggest}; {hint}")


def choose(
    shape: Shape,
    *,
    context: int,
    global_batch: int,
    device: Device,
    nodes: int = 1,
    per_node: int = 1,
    trainable_params: int | None = None,
    precision: str = "bf16",
    forced: Mapping[str, int | str] | None = None,
    head: bool = True,
) -> tuple[Layout, Memory]:
    """The layout of a training step of `global_batch` sequences of `context` tokens, and its memory.

    All devices that the batch can feed are used. In order: the least tensor parallelism that gives each data
    rank a sequence; no recomputation; state sharded inside a node; the largest micro-batch. What does not fit
    turns, one after the other, to sharding over all nodes, recomputation, context and tensor parallelism.
    `forced` fixes fields. Raises DoesNotFit, or ValueError where the forced values contradict each other.
    """
    pairs: Forced = tuple(sorted((forced or {}).items()))
    for key, _ in pairs:
        if key not in FORCEABLE:
            raise ValueError(f"layout has no settable {key!r}: choose from {', '.join(FORCEABLE)}")
    if global_batch < 1:
        raise ValueError(f"the global batch is {global_batch}: it needs at least one sequence")
    return _choose(
        shape, context, global_batch, device, nodes, per_node, trainable_params, precision, pairs, head
    )


@lru_cache(maxsize=16384)
def _choose(
    shape: Shape,
    context: int,
    batch: int,
    device: Device,
    nodes: int,
    per_node: int,
    trainable: int | None,
    precision: str,
    pairs: Forced,
    head: bool,
) -> tuple[Layout, Memory]:
    device.peak(precision)  # raises where the device lacks the precision
    forced = dict(pairs)
    if device.kind == "cpu":
        nodes = per_node = 1
    limit = device.usable
    leanest: Memory | None = None
    devices = 1  # of the leanest
    for layout in _spreads(shape, context, batch, nodes, per_node, precision, forced):
        for micro in _micro_batches(batch // layout.data, context, device.kind, forced):
            tried = replace(layout, micro_batch=micro, grad_accum=batch // layout.data // micro)
            held = memory.training(
                shape, tried, context, trainable_params=trainable, kind=device.kind, head=head
            )
            if held.total <= limit:
                why = _why(shape, tried, held, device, batch, nodes, per_node, trainable, forced)
                return replace(tried, why=why), held
            if leanest is None or held.total < leanest.total:
                leanest, devices = held, tried.devices
    if leanest is None:
        asked = ", ".join(f"{k} {v}" for k, v in pairs) or "the defaults"
        raise ValueError(
            f"{asked}: no layout of {nodes} x {per_node} devices divides "
            f"{shape.heads}/{shape.kv_heads} heads, {shape.layers} layers, a context of {context} "
            f"and a batch of {batch} sequences that way"
        )
    raise DoesNotFit(leanest.biggest, _hint(leanest, device, trainable, devices, per_node), leanest, limit)


def _spreads(
    shape: Shape,
    context: int,
    batch: int,
    nodes: int,
    per_node: int,
    precision: str,
    forced: dict[str, int | str],
) -> Iterator[Layout]:
    """Layouts without a micro-batch, from the fastest to the leanest."""
    available = nodes * per_node

    def options(name: str, values: list[int]) -> list[int]:
        return [int(forced[name])] if name in forced else values

    powers = [2**i for i in range(15)]
    tps = [
        t
        for t in options("tp", [t for t in powers if t <= per_node])
        if shape.heads % t == 0 and shape.kv_heads % t == 0 and per_node % t == 0
    ]
    # Begin with the least tp that lets the batch feed all devices; the smaller ones leave devices idle and
    # come last.
    feed = [t for t in tps if available // t <= batch]
    tps = feed + [t for t in tps if t not in feed]
    cps = [
        c for c in options("cp", [c for c in powers if c == 1 or context // c >= 4096]) if context % c == 0
    ]
    pps = [p for p in options("pp", [1]) if shape.layers % p == 0]
    ep = int(forced.get("ep", 1))
    if (shape.moe.experts if shape.moe else 1) % ep:
        return
    recomputes = [str(forced["recompute"])] if "recompute" in forced else ["none", "full"]
    for tp in tps:
        for cp in cps:
            for pp in pps:
                model = tp * cp * pp
                devices = _devices(available, nodes, per_node, model, batch, forced)
                if devices is None:
                    continue
                data = devices // model
                used = -(-devices // per_node)
                for recompute in recomputes:
                    for shard in _shards(data, used, model, per_node, forced):
                        if shard % ep == 0:
                            yield Layout(
                                used, devices, data // shard, shard, tp, cp, pp, ep,
                                recompute=recompute, precision=precision,
                            )  # fmt: skip


def _devices(
    available: int, nodes: int, per_node: int, model: int, batch: int, forced: dict[str, int | str]
) -> int | None:
    """The most devices, in whole nodes once over one, whose data ranks share the batch evenly."""
    micro = int(forced.get("micro_batch", 1))
    wanted = {int(forced[k]) for k in ("devices",) if k in forced}
    if "dp_shard" in forced and "dp_replicate" in forced:
        wanted.add(int(forced["dp_shard"]) * int(forced["dp_replicate"]) * model)
    whole = [n * per_node for n in range(nodes, 1, -1)] + list(range(min(per_node, available), 0, -1))
    for devices in whole:
        if devices % model or (wanted and wanted != {devices}):
            continue
        if "nodes" in forced and -(-devices // per_node) != int(forced["nodes"]):
            continue
        data = devices // model
        if data % int(forced.get("dp_shard", 1)) or data % int(forced.get("dp_replicate", 1)):
            continue
        if batch % (data * micro) == 0:
            return devices
    return None


def _shards(data: int, nodes: int, model: int, per_node: int, forced: dict[str, int | str]) -> list[int]:
    """Inside a node first (hybrid sharding: gathers stay on its links), then over all data ranks."""
    if "dp_shard" in forced:
        return [int(forced["dp_shard"])]
    if "dp_replicate" in forced:
        return [data // int(forced["dp_replicate"])]
    inside = max(1, per_node // model)
    return [inside, data] if nodes > 1 and inside < data and data % inside == 0 else [data]


def _micro_batches(sequences: int, context: int, kind: str, forced: dict[str, int | str]) -> list[int]:
    """Powers of two that divide a rank's sequences, largest first, up to MICRO_TOKENS."""
    if "micro_batch" in forced:
        micro = int(forced["micro_batch"])
        return [micro] if sequences % micro == 0 else []
    most = max(1, MICRO_TOKENS[kind] // context)
    return [m for m in (2**i for i in range(15, -1, -1)) if m <= most and sequences % m == 0]


def _why(
    shape: Shape,
    layout: Layout,
    held: Memory,
    device: Device,
    batch: int,
    nodes: int,
    per_node: int,
    trainable: int | None,
    forced: dict[str, int | str],
) -> tuple[str, ...]:
    why: list[str] = []
    if forced:
        why.append("set in the spec: " + ", ".join(f"{k} {v}" for k, v in sorted(forced.items())))
    state = held.weights + held.gradients + held.optimizer
    params = count(shape).total
    if device.kind == "cpu":
        why.append(f"one process on {device.cores} cores: {_gb(state)} of weights, gradients and moments")
    else:
        idle = nodes * per_node - layout.devices
        why.append(
            f"{layout.devices} devices on {layout.nodes} node{'s'[: layout.nodes > 1]}"
            + (
                f": a batch of {batch} sequences cannot feed the other {idle} evenly"
                if idle
                else ": all there are"
            )
        )
        each = (
            f"16 bytes x {_short(params)}"
            if trainable is None
            else f"frozen {_short(params)}, trained {_short(trainable)}"
        )
        if layout.dp_shard > 1:
            scope = ", replicated over nodes" if layout.dp_replicate > 1 else ""
            why.append(f"dp_shard {layout.dp_shard}{scope}: {each} parameters come to {_gb(state)} a device")
        if layout.tp > 1 and "tp" not in forced:
            why.append(
                f"tp {layout.tp}: with less the batch is too small for the devices, or a device for the model"
            )
        if layout.cp > 1 and "cp" not in forced:
            why.append(f"cp {layout.cp}: a whole sequence's activations do not fit one device")
    if layout.recompute != "none" and "recompute" not in forced:
        why.append("recompute full: activations would not fit; about a third more work")
    why.append(
        f"micro-batch {layout.micro_batch} x {layout.grad_accum} accumulated: "
        f"{_gb(held.total)} of {_gb(device.usable)} usable, the most for {held.biggest}"
    )
    return tuple(why)


def _hint(held: Memory, device: Device, trainable: int | None, devices: int, per_node: int) -> str:
    state = held.weights + held.gradients + held.optimizer
    if device.kind == "cpu":
        return "use a smaller size, a shorter context, or a GPU backend"
    if held.biggest in ("activations", "logits"):
        return "shorten the context, use more devices a node (for tp and cp), or a smaller vocabulary"
    room = device.usable - (held.total - state)
    adapter = "" if trainable is not None else ", train a LoRA adapter"
    if room > 0:
        need = per_node  # a power of two of nodes: batches divide by it
        while need < devices * state / room:
            need *= 2
        return f"use {need} devices of this kind{adapter}, or devices with more memory"
    return f"use devices with more memory{adapter}, or a smaller size"


def _gb(value: float) -> str:
    return f"{value / 1e9:.3g} GB"


def _short(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(int(value))
