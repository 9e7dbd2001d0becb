"""Graph x backends x store -> Plan: for every step its key, layout, memory, time, price, status and the reasons.

In: a Graph, the store (read only). Out: Plan. Nothing is written and nothing is probed but this machine's own CPU when a
backend is local. A number says its basis: measured (the step ran here before), modelled, or assumed.
Status: cached (the artifact is there), new, changed (another key is there: `because` names the field, old -> new),
blocked (it, or what it needs, can't run here: `because` says why).
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from famc.backend import Accelerator
from famc.cost import money
from famc.cost.device import Impossible
from famc.cost.layout import DoesNotFit, Layout
from famc.cost.memory import Memory
from famc.cost.parameters import count
from famc.errors import FitError, StoreError
from famc.graph import Graph, Node
from famc.hardware import LOCAL, Hardware
from famc.hardware import hardware as hardware_of
from famc.job import KEY_SCHEMA, Job, preimage
from famc.price import Quote, options, price, question
from famc.spec.family import Family
from famc.steps import KINDS
from famc.store import Store, digest, read_record

__all__ = [
    "LOCAL",
    "Hardware",
    "Plan",
    "Planned",
    "differences",
    "explain",
    "keys",
    "measured",
    "plan",
    "ways",
]


@dataclass(frozen=True)
class Planned:
    """One step of a plan."""

    node: Node
    key: str
    status: str
    because: tuple[str, ...]
    hardware: Hardware
    layout: Layout
    memory: Memory
    limit: float
    seconds: float
    mfu: float
    basis: str
    interval: tuple[float, float] = (0.0, 0.0)  # seconds between which 90 % are expected
    precision_why: str = ""
    threads: int = 1

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def device_hours(self) -> float:
        return self.seconds * self.layout.devices / 3600

    @property
    def cost_usd(self) -> float:
        return money.usd(self.seconds, self.layout.devices, self.hardware.usd_per_device_hour)

    @property
    def energy_kwh(self) -> float:
        device = self.hardware.accelerator.device
        share = self.threads / device.cores if device.kind == "cpu" else 1.0
        return money.energy_kwh(self.seconds, self.layout.devices, device) * share

    @property
    def co2e_kg(self) -> float:
        return money.co2e_kg(self.energy_kwh, self.hardware.grid)

    def to_dict(self) -> dict[str, Any]:
        """The step as `famc plan --json` shows it."""
        node, layout, held = self.node, self.layout, self.memory
        total = {"total": held.total, "limit": self.limit}
        parameters = count(node.shape) if node.shape else None
        return {
            "name": node.name, "kind": node.kind, "key": self.key, "size": node.size, "variant": node.variant,
            "needs": list(node.needs), "status": self.status, "because": list(self.because),
            "backend": self.hardware.name,
            "layout": {
                "nodes": layout.nodes, "devices": layout.devices, "dp_replicate": layout.dp_replicate,
                "dp_shard": layout.dp_shard, "tp": layout.tp, "cp": layout.cp, "pp": layout.pp, "ep": layout.ep,
                "micro_batch": layout.micro_batch, "grad_accum": layout.grad_accum, "recompute": layout.recompute,
                "precision": layout.precision, "threads": self.threads,
                "why": [*layout.why, *([self.precision_why] if self.precision_why else [])],
            },
            "memory": {
                "weights": held.weights, "gradients": held.gradients, "optimizer": held.optimizer,
                "activations": held.activations, "logits": held.logits, "kv_cache": held.kv_cache,
                "overhead": held.overhead, **total,
            },
            "params": {"total": parameters.total, "active": parameters.active} if parameters else {"total": 0, "active": 0},
            "tokens": node.work.tokens, "flops": node.work.flops, "mfu": self.mfu, "seconds": self.seconds,
            "interval": list(self.interval), "device_hours": self.device_hours, "cost_usd": self.cost_usd, "energy_kwh": self.energy_kwh,
            "co2e_kg": self.co2e_kg, "basis": self.basis,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All steps, each after what it needs."""

    graph: Graph
    steps: Mapping[str, Planned]
    out: Path
    keys: Mapping[str, str]  # of every step of the graph, planned or not

    @property
    def family(self) -> Family:
        return self.graph.spec.family

    @cached_property
    def to_run(self) -> tuple[Planned, ...]:
        """Steps whose artifact is not there."""
        return tuple(s for s in self.steps.values() if s.status != "cached")

    def totals(self) -> dict[str, Any]:
        """Sums over the steps that are to run."""
        run = self.to_run
        counts: dict[str, int] = {}
        for step in self.steps.values():
            counts[step.status] = counts.get(step.status, 0) + 1
        return {
            "steps": len(self.steps),
            "status": dict(sorted(counts.items())),
            "seconds": sum(s.seconds for s in run),
            "device_hours": sum(s.device_hours for s in run),
            "cost_usd": sum(s.cost_usd for s in run),
            "energy_kwh": sum(s.energy_kwh for s in run),
            "co2e_kg": sum(s.co2e_kg for s in run),
            "flops": sum(s.node.work.flops for s in run),
            "tokens": sum(s.node.work.tokens for s in run),
        }

    def to_dict(self) -> dict[str, Any]:
        """The steps and their sums, as `famc plan --json` shows them; famc.planning adds when they run."""
        return {
            "family": self.family.family.name,
            "steps": [s.to_dict() for s in self.steps.values()],
            "totals": self.totals(),
        }

    def job(self, name: str) -> Job:
        """The job file of a step."""
        step = self.steps[name]
        node = step.node
        stem = f"{name.replace('/', '.')}-{step.key[:12]}"
        return Job(
            name=name,
            kind=node.kind,
            key=step.key,
            store=str(self.out / "store"),
            params=node.params,
            runtime=node.runtime,
            inputs={role: (need, self.steps[need].key) for role, need in node.inputs.items()},
            version=KINDS[node.kind].version,
            seed=self.family.family.seed,
            threads=step.threads,
            precision=step.layout.precision,
            micro_batch=step.layout.micro_batch if node.work.mode == "train" else None,
            recompute=step.layout.recompute,
            memory=step.memory.total,
            seconds=step.seconds,
            because=(*step.layout.why, *((step.precision_why,) if step.precision_why else ())),
            log=str(self.out / "logs" / f"{stem}.log"),
            metrics=str(self.out / "logs" / f"{stem}.jsonl"),
            offline=not (node.params.get("origin") == "hf" or node.params.get("hf")),
        )


def keys(graph: Graph) -> dict[str, str]:
    """The key of every step: hash of its kind, parameters and inputs' keys."""
    result: dict[str, str] = {}
    for name, node in graph.nodes.items():
        inputs = {role: result[need] for role, need in node.inputs.items()}
        result[name] = digest(preimage(node.kind, KINDS[node.kind].version, node.params, inputs))
    return result


def plan(
    graph: Graph, out: Path, *, names: Iterable[str] | None = None, local: Accelerator | None = None
) -> Plan:
    """Plan the steps named (default: all) and what they need. Raises FitError with every step that fits no layout.

    `out` holds the store. `local` is this machine (default: looked at), for backends that name no accelerator.
    """
    store = Store(out / "store")
    hardware = hardware_of(graph.spec.family, graph.spec.folder, local)
    fallback = hardware.get(LOCAL) or next(iter(hardware.values()))
    all_keys = keys(graph)
    wanted = set(graph.nodes) if names is None else graph.closure(names, up=True)
    present = store.scan()
    steps: dict[str, Planned] = {}
    unfit: list[str] = []
    quotes: dict[Hashable, Quote] = {}  # of training steps, which are many and much alike in large families
    for name, node in graph.nodes.items():
        if name not in wanted:
            continue
        where = hardware.get(node.backend or "", fallback)
        key = all_keys[name]
        standing = _status(node, key, present.get(name, []), steps, store)
        try:
            steps[name] = _planned(node, key, where, *standing, _quoted(node, where, quotes))
        except (DoesNotFit, Impossible) as error:
            unfit.append(_unfit(node, where, error))
    if unfit:
        raise FitError("\n".join(unfit))
    return Plan(graph, steps, out, all_keys)


def _quoted(node: Node, where: Hardware, known: dict[Hashable, Quote]) -> Quote:
    """The price of a step, looked up where one like it was priced already."""
    if node.work.mode != "train":
        return price(node, where)
    asked = (where.name, question(node))
    if asked not in known:
        known[asked] = price(node, where)
    return known[asked]


def measured(made: Plan) -> Plan:
    """The plan with what cached steps really took, from their records: one file each, so only where it is shown."""
    store = Store(made.out / "store")
    steps = dict(made.steps)
    for name, step in made.steps.items():
        seconds = _measured(store, name, step.key) if step.status == "cached" else None
        if seconds is not None:
            steps[name] = replace(step, seconds=seconds, basis="measured", interval=(seconds, seconds))
    return replace(made, steps=steps)


def ways(step: Planned) -> tuple[Planned, ...]:
    """The step with each of its layouts of which none is slower and on as many devices (or threads) as another: devices
    ascending, seconds descending. One for what is not spread."""
    found = options(step.node, step.hardware)
    return tuple(_planned(step.node, step.key, step.hardware, step.status, step.because, q) for q in found)


def _planned(
    node: Node, key: str, where: Hardware, status: str, because: tuple[str, ...], quote: Quote
) -> Planned:
    if status in ("new", "changed") and (why := _only_planned(node, where, quote.layout)):
        status, because = "blocked", (why,)
    return Planned(
        node, key, status, because, where, quote.layout, quote.memory, quote.limit, quote.seconds, quote.mfu, quote.basis,
        quote.interval, quote.precision_why, quote.threads,
    )  # fmt: skip


def _only_planned(node: Node, where: Hardware, layout: Layout) -> str:
    """Why a training step can be priced but not run by famc; empty where it can."""
    if node.work.mode != "train":
        return ""
    if why := where.accelerator.no_training():
        return why
    degrees = [f"{n} {v}" for n, v in (("pp", layout.pp), ("ep", layout.ep)) if v > 1]
    if layout.precision not in ("bf16", "fp16", "fp32"):
        degrees.append(layout.precision)
    return (
        f"{', '.join(degrees)}: backends.{where.name}.runtime is any, and famc's trainers have none of it"
        if degrees
        else ""
    )


def _unfit(node: Node, where: Hardware, error: Exception) -> str:
    text = f"{node.name} does not fit {where.name}"
    if isinstance(error, DoesNotFit):
        return f"{text}: {error}"
    return f"{text} ({where.accelerator.name}): {error}"


# --- status ----------------------------------------------------------------------------------------------------------


def _status(
    node: Node, key: str, present: list[Path], steps: Mapping[str, Planned], store: Store
) -> tuple[str, tuple[str, ...]]:
    if any(folder.name.endswith(key[:12]) for folder in present):
        return "cached", ()
    lacking = [need for need in node.needs if need not in steps]  # it fits nowhere: told by FitError
    blocked = [need for need in node.needs if need in steps and steps[need].status == "blocked"]
    if node.missing:
        return "blocked", node.missing
    if blocked or lacking:
        return "blocked", tuple(f"needs {need}" for need in (*blocked, *lacking))
    if not present:
        return "new", ()
    reasons = explain(node, steps, present[0])
    return "changed", tuple(reasons) or ("its artifact was made by another version of the key schema",)


def explain(node: Node, steps: Mapping[str, Planned], older: Path) -> list[str]:
    """What differs between a step and an older artifact of it: `field: old -> new`."""
    try:
        old = read_record(older).get("identity", {})
    except StoreError as error:
        return [error.message]
    reasons = []
    if old.get("schema") != KEY_SCHEMA:
        reasons.append(f"key schema: {old.get('schema')} -> {KEY_SCHEMA}")
    reasons += _own(node, old)
    old_inputs = old.get("inputs", {})
    for role, need in node.inputs.items():
        if role not in old_inputs:
            reasons.append(f"new input {need}")
        elif old_inputs[role] != steps[need].key:
            reasons.append(
                f"needs {need}, which {'changed' if steps[need].status != 'cached' else 'is another one'}"
            )
    reasons += [f"no longer reads {role}" for role in sorted(set(old_inputs) - set(node.inputs))]
    return reasons


def differences(node: Node, old: Mapping[str, Any]) -> list[str]:
    """What differs between a step and what bore its identity in a plan: version, params, inputs by role."""
    read = old["inputs"]
    return _own(node, old) + [
        f"{role}: reads {read.get(role, 'nothing')} -> {node.inputs.get(role, 'nothing')}"
        for role in sorted(read.keys() | node.inputs.keys())
        if read.get(role) != node.inputs.get(role)
    ]


def _own(node: Node, old: Mapping[str, Any]) -> list[str]:
    """What differs in a step itself, and where it was written."""
    version = KINDS[node.kind].version
    reasons = []
    if old.get("version") != version:
        reasons.append(f"{node.kind} worker's version: {old.get('version')} -> {version}")
    before, now = _flat(old.get("params", {})), _flat(node.params)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            origin = node.origins.get(name.partition(".")[0]) or node.origins.get(name)
            place = f" ({origin})" if origin and name in now else ""
            reasons.append(
                f"{name}: {_short(before.get(name, 'not set'))} -> {_short(now.get(name, 'not set'))}{place}"
            )
    return reasons


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        result: dict[str, Any] = {}
        for key, item in value.items():
            result.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
        return result
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        result = {}
        for index, item in enumerate(value):
            result.update(_flat(item, f"{prefix}.{index}"))
        return result
    return {prefix: list(value) if isinstance(value, tuple) else value}


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _measured(store: Store, name: str, key: str) -> float | None:
    """Seconds that the step took when it ran; None if it was never run here (early cut-off)."""
    with contextlib.suppress(StoreError):
        value = store.record(name, key).get("seconds")
        return float(value) if value else None
    return None
