"""Graph x backends x store -> Plan: for every step its key, layout, memory, time, price, status and the reasons.

In: a Graph, the store (read only). Out: Plan. Nothing is written and nothing is probed but this machine's own CPU when a
backend is local. A number says its basis: measured (the step ran here before), modelled, or assumed.
Status: cached (the artifact is there), new, changed (another key is there: `because` names the field, old -> new),
blocked (it, or what it needs, can't run here: `because` says why).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from famc.backend import Accelerator, detect_cpu, load_accelerator
from famc.cost import memory, money, roofline
from famc.cost.layout import DoesNotFit, Layout, choose
from famc.cost.memory import RUNTIME, Memory
from famc.cost.parameters import count, lora
from famc.errors import FitError, StoreError
from famc.graph import Graph, Node
from famc.job import KEY_SCHEMA, Job, preimage
from famc.spec.family import BackendUse, Family
from famc.steps import KINDS
from famc.steps.exports import export_memory
from famc.store import Store, digest, read_record

# A worker without a model still holds Python, the tokenizer, and a few chunks of text (measured: 150–350 MB).
PLAIN_MEMORY = Memory(overhead=4.0e8)
LOCAL = "local"


@dataclass(frozen=True)
class Hardware:
    """A backend as the spec uses it: the accelerator, how many, and what it costs."""

    name: str
    accelerator: Accelerator
    nodes: int
    per_node: int
    scheduler: str
    usd_per_device_hour: float
    price_basis: str

    @property
    def local(self) -> bool:
        """Whether famc itself starts the jobs, here."""
        return self.scheduler == "local"


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
            "device_hours": self.device_hours, "cost_usd": self.cost_usd, "energy_kwh": self.energy_kwh,
            "co2e_kg": money.co2e_kg(self.energy_kwh), "basis": self.basis,
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

    @cached_property
    def makespan_seconds(self) -> float:
        """Wall time of what is to run: list scheduling in graph order on the cores (local) or devices of each backend."""
        return _makespan(self)

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
            "co2e_kg": sum(money.co2e_kg(s.energy_kwh) for s in run),
            "flops": sum(s.node.work.flops for s in run),
            "tokens": sum(s.node.work.tokens for s in run),
        }

    def to_dict(self) -> dict[str, Any]:
        """`famc plan --json`."""
        return {
            "family": self.family.family.name,
            "steps": [s.to_dict() for s in self.steps.values()],
            "totals": self.totals(),
            "makespan_seconds": self.makespan_seconds,
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
    hardware = _hardware(graph.spec.family, graph.spec.folder, local)
    fallback = hardware.get(LOCAL) or next(iter(hardware.values()))
    all_keys = keys(graph)
    wanted = set(graph.nodes) if names is None else graph.closure(names, up=True)
    present = store.scan()
    steps: dict[str, Planned] = {}
    unfit: list[str] = []
    for name, node in graph.nodes.items():
        if name not in wanted:
            continue
        where = hardware.get(node.backend or "", fallback)
        key = all_keys[name]
        standing = _status(node, key, present.get(name, []), steps, store)
        try:
            steps[name] = _plan_step(node, key, where, *standing)
        except (DoesNotFit, ValueError) as error:
            unfit.append(_unfit(node, where, error))
    if unfit:
        raise FitError("\n".join(unfit))
    return Plan(graph, steps, out, all_keys)


def measured(made: Plan) -> Plan:
    """The plan with what cached steps really took, from their records: one file each, so only where it is shown."""
    store = Store(made.out / "store")
    steps = dict(made.steps)
    for name, step in made.steps.items():
        seconds = _measured(store, name, step.key) if step.status == "cached" else None
        if seconds is not None:
            steps[name] = replace(step, seconds=seconds, basis="measured")
    return replace(made, steps=steps)


# --- hardware --------------------------------------------------------------------------------------------------------


def _hardware(family: Family, folder: Path, local: Accelerator | None) -> dict[str, Hardware]:
    machine: list[Accelerator] = [] if local is None else [local]

    def here() -> Accelerator:
        if not machine:
            machine.append(detect_cpu())
        return machine[0]

    result = {name: _use(name, use, folder, here) for name, use in family.backends.items()}
    if not result:
        result[LOCAL] = _use(LOCAL, BackendUse(), folder, here)
    return result


def _use(name: str, use: BackendUse, folder: Path, here: Any) -> Hardware:
    chip = use.gpu or use.use
    accelerator: Accelerator = load_accelerator(chip, folder) if chip else here()
    if accelerator.kind == "cpu":
        changes: dict[str, Any] = {}
        if use.cpu:
            accelerator = accelerator.with_cores(use.cpu)
        if use.ram:
            changes["memory_gb"] = use.ram / 1e9
        if changes:
            accelerator = accelerator.model_copy(update=changes)
    devices = use.per_node if accelerator.kind == "gpu" else 1
    if use.usd_per_gpu_hour is not None:
        price, basis = use.usd_per_gpu_hour, "spec"
    elif use.usd_per_hour is not None:
        price, basis = use.usd_per_hour / devices, "spec"
    elif accelerator.usd_per_hour is not None:
        price, basis = (
            accelerator.usd_per_hour.on_demand,
            f"{accelerator.usd_per_hour.source}, {accelerator.usd_per_hour.date}",
        )
    else:
        price, basis = 0.0, "none known"
    return Hardware(name, accelerator, use.nodes, devices, use.scheduler, price, basis)


# --- one step --------------------------------------------------------------------------------------------------------


def _plan_step(node: Node, key: str, where: Hardware, status: str, because: tuple[str, ...]) -> Planned:
    device = where.accelerator.device
    wish = node.params.get("precision", "auto")
    precision, why = where.accelerator.training_precision() if wish == "auto" else (wish, "set in the spec")
    if device.kind == "cpu" and wish == "auto" and precision == "bf16":
        why = "bf16 autocast: this CPU multiplies bf16 in hardware"
    threads = _threads(node, device.cores) if device.kind == "cpu" else 1
    work = node.work
    if work.mode == "train" and node.shape is not None:
        adapters = node.params.get("lora")
        trainable = lora(node.shape, int(adapters["r"])) if adapters else None
        batch = max(1, round(work.sequences))
        forced = {k: node.runtime[k] for k in ("micro_batch", "recompute") if node.runtime.get(k) is not None}
        held_context = work.context * work.rows
        layout, held = choose(
            node.shape, context=held_context, global_batch=batch, device=device, nodes=where.nodes, per_node=where.per_node,
            trainable_params=trainable, precision=precision, forced=forced, head=work.head,
        )  # fmt: skip
        used = where.accelerator.with_cores(threads).device if device.kind == "cpu" else device
        estimate = roofline.job(
            node.shape, layout, used, steps=max(1, math.ceil(work.optimizer_steps)), context=work.context,
            per_node=where.per_node, flops=work.flops, trainable_params=trainable,
        )  # fmt: skip
        return Planned(node, key, status, because, where, layout, held, device.usable, estimate.seconds + work.cpu_seconds, estimate.mfu,
                       _weaker(estimate.basis, work.basis), why, threads)  # fmt: skip
    layout = Layout(precision="fp32" if device.kind == "cpu" else precision)
    if work.mode == "infer" and node.shape is not None:
        context = min(work.context, 4096)
        layout = Layout(micro_batch=8, precision=layout.precision)
        held = memory.inference(node.shape, layout, context, kind=device.kind)
        while held.total > device.usable and layout.tp < where.per_node:
            tp = layout.tp * 2
            layout = Layout(
                devices=tp,
                tp=tp,
                micro_batch=8,
                precision=layout.precision,
                why=(f"weights over {tp} devices",),
            )
            held = memory.inference(node.shape, layout, context, kind=device.kind)
        if held.total > device.usable:
            raise DoesNotFit(held.biggest, "use a backend with more memory", held, device.usable)
        peak = device.peak(layout.precision) * layout.devices
        seconds = roofline.STARTUP[device.kind] / 3 + work.flops / (peak * 0.3) + work.cpu_seconds
        return Planned(node, key, status, because, where, layout, held, device.usable, seconds, work.flops / (seconds * peak),
                       "modelled", "", threads)  # fmt: skip
    if node.kind == "export" and node.shape is not None:
        held = Memory(
            weights=export_memory(node.shape, count(node.shape).total, node.params), overhead=RUNTIME["cpu"]
        )
    else:
        held = PLAIN_MEMORY
    seconds = 0.5 + work.cpu_seconds
    return Planned(
        node, key, status, because, where, layout, held, device.usable, seconds, 0.0, work.basis, "", threads
    )


def _threads(node: Node, cores: int) -> int:
    """Cores of a job: small matrices gain little from more than one, and other jobs run beside it."""
    if node.work.mode != "train" or node.shape is None:
        return 1
    return max(1, min(cores, round(count(node.shape).total / PARAMETERS_A_THREAD)))


# Parameters that keep one more CPU thread busy in training. A second thread made the example's 2.5 M model 1.1 to 1.2
# times as fast (benchmarks/build.py --loop prints it): below, two jobs side by side do more.
PARAMETERS_A_THREAD = 10_000_000


def _weaker(*bases: str) -> str:
    order = ("measured", "modelled", "assumed")
    return max(bases, key=order.index)


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
    version = KINDS[node.kind].version
    reasons = []
    if old.get("schema") != KEY_SCHEMA:
        reasons.append(f"key schema: {old.get('schema')} -> {KEY_SCHEMA}")
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


# --- time ------------------------------------------------------------------------------------------------------------


def _makespan(plan: Plan) -> float:
    """Greedy list scheduling: each step starts when its needs are done and its devices are free."""
    import heapq

    free: dict[str, list[float]] = {}
    done: dict[str, float] = {}
    last = 0.0
    for name, step in plan.steps.items():
        ready = max((done.get(need, 0.0) for need in step.node.needs), default=0.0)
        if step.status == "cached":
            done[name] = ready
            continue
        hardware = step.hardware
        cpu = hardware.accelerator.kind == "cpu"
        lanes = free.setdefault(
            hardware.name, [0.0] * (hardware.accelerator.device.cores if cpu else hardware.nodes)
        )
        wanted = step.threads if cpu else step.layout.nodes
        taken = [heapq.heappop(lanes) for _ in range(min(wanted, len(lanes)))]
        start = max(ready, max(taken))
        end = start + step.seconds
        for _ in taken:
            heapq.heappush(lanes, end)
        done[name] = end
        last = max(last, end)
    return last
