"""Why a layout is what it is, and what would have to change where none fits: by trying the alternatives.

In: a Priced, a Wanted, forced fields. Out: text. Bears no identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from famc.cost.device import GB
from famc.cost.layout import Layout
from famc.cost.memory import Memory
from famc.cost.priced import Priced, priced, setup_of
from famc.cost.spreads import RECOMPUTES, Wanted
from famc.cost.step_memory import CONTEXT, MARGIN, NCCL

Forced = Mapping[str, int | str]
MOST_NODES = 4096
"""Nodes up to which a larger cluster is looked at for what does not fit."""
UNLIKELY = 4.0
"""Times a device's memory that the next larger kind hardly has."""


def why(w: Wanted, p: Priced, forced: Forced, objective: str = "") -> tuple[str, ...]:
    """The reasons of a layout that was chosen by `objective` (time, cost, or for its number of devices): each degree against the next smaller one, which does not fit, or is slower by how much."""
    lay, lines = p.setup.layout, []
    if forced:
        lines.append("set: " + ", ".join(f"{k} {v}" for k, v in sorted(forced.items())))
    state = p.memory.weights + p.memory.gradients + p.memory.optimizer
    if w.device.kind == "cpu":
        lines.append(f"one process on {w.device.cores} cores: {gb(state)} of weights, gradients and moments")
    else:
        lines.append(f"{lay.devices} devices on {_nodes(lay.nodes)}: {_others(w, p, forced, objective)}")
        if lay.dp_shard > 1:
            scope = f", {lay.dp_replicate} replicas" if lay.dp_replicate > 1 else ""
            what = {"full": "weights, gradients and moments", "gradients": "gradients and moments"}.get(
                p.setup.sharding, "moments"
            )
            lines.append(f"dp_shard {lay.dp_shard}{scope}: {what} divided, {gb(state)} of state a device")
        for name in ("tp", "cp", "pp", "ep"):
            degree = getattr(lay, name)
            if degree > 1 and name not in forced:
                lines.append(f"{name} {degree}: {_against(w, p, name, forced)}")
        if p.setup.vpp > 1 and "vpp" not in forced:
            lines.append(f"{p.setup.vpp} chunks a pipeline stage: the bubble is as many times smaller")
    if lay.recompute != "none" and "recompute" not in forced:
        lines.append(f"recompute {lay.recompute}: {_against(w, p, 'recompute', forced)}")
    if w.precision == "auto" and lay.precision == "fp8":
        lines.append(f"precision fp8: {_against(w, p, 'precision', forced)}")
    lines.append(
        f"micro-batch {lay.micro_batch} x {lay.grad_accum} accumulated: "
        f"{gb(p.memory.total)} of {gb(p.limit)} usable, the most for {p.memory.biggest}"
    )
    return tuple(lines)


def _others(w: Wanted, p: Priced, forced: Forced, objective: str) -> str:
    lay = p.setup.layout
    if "devices" in forced or "nodes" in forced:
        return "as set"
    if lay.devices == w.nodes * w.per_node:
        return "all there are"
    if objective == "cost":
        return "more cost more device-hours"
    if objective == "time":
        return f"more are not faster, or cannot share {w.global_batch} sequences and the model evenly"
    return "the fastest layout on so many"


def _against(w: Wanted, p: Priced, name: str, forced: Forced) -> str:
    """What a half of that degree, or less recomputation, would have come to."""
    lay = p.setup.layout
    if name == "recompute":
        less = w.recomputes[w.recomputes.index(lay.recompute) - 1]
        other, what = replace(lay, recompute=less), less
    elif name == "precision":
        half = "bf16" if "bf16" in dict(w.device.peaks) else "fp16"
        other, what = replace(lay, precision=half), half
    else:
        degree = getattr(lay, name) // 2
        what = str(degree)
        changed: dict[str, Any] = {name: degree}
        if name != "ep":
            data = lay.data * 2
            if w.global_batch % data:
                return f"with {what} a batch of {w.global_batch} does not feed {data} data ranks"
            each = w.global_batch // data
            micro = max(m for m in range(1, min(lay.micro_batch, each) + 1) if each % m == 0)
            changed |= {"dp_shard": lay.dp_shard * 2, "micro_batch": micro, "grad_accum": each // micro}
        other = replace(lay, **changed)
    each = other.micro_batch * other.grad_accum
    sizes = [m for m in range(other.micro_batch, 0, -1) if each % m == 0]
    if "micro_batch" in forced:
        sizes = sizes[:1]
    need = 0.0
    for micro in sizes:
        found = _tried(w, p, replace(other, micro_batch=micro, grad_accum=each // micro))
        if found is None:
            return f"with {what} the layout does not divide"
        if found.fits:
            only = f"only micro-batches of {micro} fit and " if micro < other.micro_batch else ""
            return f"with {what} {only}a step takes {found.time.seconds / p.time.seconds:.2f} times as long"
        need = found.memory.total
    return f"with {what} it needs {gb(need)} of {gb(p.limit)} usable"


def _tried(w: Wanted, p: Priced, lay: Layout) -> Priced | None:
    try:
        return priced(setup_of(w, lay, p.setup.vpp if lay.pp == p.setup.layout.pp else 1), w.beside)
    except ValueError:
        return None


# --- what would fit ---------------------------------------------------------------------------------------


def nearest(w: Wanted, forced: Forced, leanest: Memory, feasible: Callable[[Wanted, Forced], bool]) -> str:
    """The first of these that fits: a set field changed, more nodes; and the memory that would do without either."""
    need = (leanest.total / (1 - MARGIN) + CONTEXT + NCCL) / GB
    if w.device.kind == "cpu":
        share = w.device.usable / w.device.memory
        changes = [text for text, a, b in _changes(w, forced) if feasible(a, b)][:1]
        return "; or ".join(
            [*changes, f"a host with {leanest.total / (1 - MARGIN) / share / GB:.3g} GB of memory"]
        )
    for text, other, changed in _changes(w, forced):
        if feasible(other, changed):
            return f"{text} would fit, or devices with {need:.0f} GB"
    if need * GB > UNLIKELY * w.device.memory:
        return f"no number of them would fit, only devices with {need:,.0f} GB: use a smaller model, or a larger batch"
    return f"devices with {need:.0f} GB would fit"


def _changes(w: Wanted, forced: Forced) -> Iterator[tuple[str, Wanted, Forced]]:
    if forced.get("recompute", "full") != "full":
        place = RECOMPUTES.index(str(forced["recompute"]))
        for other in (r for r in RECOMPUTES[place + 1 :] if r in w.recomputes):
            yield f"recompute {forced['recompute']} -> {other}", w, {**forced, "recompute": other}
    if "micro_batch" in forced or "grad_accum" in forced:
        micro = int(forced.get("micro_batch", 1)) // 2
        free = {k: v for k, v in forced.items() if k not in ("micro_batch", "grad_accum")}
        while micro >= 1:
            yield f"micro_batch {forced['micro_batch']} -> {micro}", w, {**free, "micro_batch": micro}
            micro //= 2
        yield "micro_batch left open", w, free
    free = {k: v for k, v in forced.items() if k not in ("dp", "dp_replicate", "grad_accum")}
    for name in ("dp_shard", "tp", "cp", "pp", "ep"):
        if name in forced:
            now, more = int(forced[name]), int(forced[name]) * 2
            while more <= w.nodes * w.per_node:
                yield f"{name} {now} -> {more}", w, {**free, name: more}
                more *= 2
    for name, one in (("devices", 1), ("nodes", w.per_node)):
        if name in forced and w.device.kind != "cpu":
            now, more = int(forced[name]), int(forced[name]) * 2
            while more * one <= MOST_NODES * w.per_node:
                nodes = max(w.nodes, -(-more * one // w.per_node))
                yield f"{name} {now} -> {more}", replace(w, nodes=nodes), {**free, name: more}
                more *= 2
    if w.device.kind != "cpu" and "devices" not in forced and "nodes" not in forced:
        extra = 1
        while w.nodes + extra <= MOST_NODES:
            yield f"{_nodes(extra)} more", replace(w, nodes=w.nodes + extra), forced
            extra = extra + 1 if extra < 4 else 2 * extra
    open_ = {k: v for k, v in forced.items() if k in ("devices", "nodes")}
    if open_ != dict(forced):
        yield "the layout left open", w, open_


def gb(value: float) -> str:
    return f"{value / GB:.3g} GB"


def _nodes(n: int) -> str:
    return f"{n} node{'s'[: n > 1]}"
