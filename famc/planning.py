"""Plan -> when each step runs, and on how much of its backend: what `famc plan` decides beyond one step.

In: a Plan, whose steps have one layout each, and perhaps an objective. Out: Timetable. With an objective each training step
may take another of its layouts: it is moldable. Bears no identity: layouts and times are in no key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from famc.errors import FitError
from famc.plan import Plan, Planned, ways
from famc.schedule import Objective, Option, Placed, Schedule, Task, schedule
from famc.spec.quantity import show_seconds

STEPS_NAMED = 4  # of a critical path, in an error


@dataclass(frozen=True)
class Timetable:
    """A plan with the layouts that were chosen, and when each step runs."""

    plan: Plan
    schedule: Schedule
    objective: Objective | None = None

    @property
    def critical_path(self) -> tuple[str, ...]:
        """The chain of steps that ends last, each waiting for the one before it (for its output or its devices)."""
        return self.schedule.critical_path

    @property
    def interval(self) -> tuple[float, float]:
        """Seconds of the critical path if each of its steps takes the least, or the most, that nine of ten are expected to:
        wider than nine of ten plans, as errors that are not the same everywhere even out."""
        spans = [self.plan.steps[name].interval for name in self.schedule.critical_path]
        return sum(low for low, _ in spans), sum(high for _, high in spans)

    def to_dict(self) -> dict[str, Any]:
        """`famc plan --json`: the plan's own, with when each step runs and how good that is."""
        told = self.plan.to_dict()
        found = self.schedule
        for step, placed in zip(told["steps"], found.placed, strict=True):
            step |= {
                "start_seconds": placed.start, "end_seconds": placed.end, "slack_seconds": placed.slack,
            }  # fmt: skip
        objective = self.objective or Objective()
        told["totals"]["kept"] = kept(self.plan)
        return {
            **told,
            "makespan_seconds": found.makespan,
            "makespan_interval": list(self.interval),
            "critical_path": list(found.critical_path),
            "lower_bound": found.lower_bound,
            "gap": found.gap,
            "schedule": {
                "minimize": objective.goal, "deadline_seconds": objective.deadline, "budget_usd": objective.budget,
                "layouts": "one a step" if self.objective is None else "chosen for the whole",
                "solver": found.solver, "status": found.status, "note": found.note,
            },
        }  # fmt: skip


def timetable(plan: Plan, objective: Objective | None = None, seconds: float = 0.0) -> Timetable:
    """When the steps of a plan run. With an objective the layouts of training steps are chosen anew, for the whole.

    `seconds`: for CP-SAT; 0 leaves it to the heuristic. Raises FitError where the deadline or the budget can't be kept.
    """
    choices = {name: _ways(step, objective) for name, step in plan.steps.items()}
    units = pools(plan)
    found = schedule(
        [Task(name, step.node.needs, _options(choices[name], units)) for name, step in plan.steps.items()],
        units,
        objective=objective,
        seconds=seconds,
    )
    if found.status in ("infeasible", "unknown"):
        raise FitError(_unreachable(found, choices))
    steps: dict[str, Planned] = {}
    for placed in found.placed:
        own = choices[placed.name]
        steps[placed.name] = own[placed.option.index] if placed.option else plan.steps[placed.name]
    return Timetable(replace(plan, steps=steps), found, objective)


def pools(plan: Plan) -> dict[str, int]:
    """What each backend of a plan has: nodes, or the cores of a CPU."""
    result: dict[str, int] = {}
    for step in plan.steps.values():
        where = step.hardware
        cpu = where.accelerator.kind == "cpu"
        result.setdefault(where.name, where.accelerator.device.cores if cpu else where.nodes)
    return result


def _options(own: Sequence[Planned], units: Mapping[str, int]) -> tuple[Option, ...]:
    return tuple(_option(way, index, units) for index, way in enumerate(own))


def _option(way: Planned, index: int, units: Mapping[str, int]) -> Option:
    pool = way.hardware.name
    wanted = way.threads if way.hardware.accelerator.kind == "cpu" else way.layout.nodes
    return Option(
        pool, min(wanted, units[pool]), way.seconds, way.cost_usd, devices=way.layout.devices, index=index
    )


def _ways(step: Planned, objective: Objective | None) -> tuple[Planned, ...]:
    """How a step can be run; nothing where its artifact is there already."""
    if step.status == "cached":
        return ()
    return (step,) if objective is None or step.node.work.mode != "train" else ways(step)


def kept(plan: Plan) -> dict[str, float]:
    """What a build of nothing would have to make again: the cached steps, and what they are priced at."""
    cached = [s for s in plan.steps.values() if s.status == "cached"]
    return {
        "steps": len(cached),
        "seconds": sum(s.seconds for s in cached),
        "device_hours": sum(s.device_hours for s in cached),
        "cost_usd": sum(s.cost_usd for s in cached),
        "energy_kwh": sum(s.energy_kwh for s in cached),
    }


def _unreachable(found: Schedule, choices: Mapping[str, Sequence[Planned]]) -> str:
    """Which limit fails, what is the least, and with which layouts."""
    chain = [p for p in found.placed if p.name in set(found.critical_path) and p.option is not None]
    longest = sorted(chain, key=lambda p: -_length(p))[:STEPS_NAMED]
    named = []
    for placed in sorted(longest, key=lambda p: p.start):
        assert placed.option is not None
        way = choices[placed.name][placed.option.index]
        named.append(
            f"{placed.name} on {way.hardware.name} {layout_text(way)}: {show_seconds(_length(placed))}"
        )
    more = f"; its longest chain: {', '.join(named)}" if named else ""
    return f"{found.reason}{more}"


def _length(placed: Placed) -> float:
    return placed.end - placed.start


def layout_text(step: Planned) -> str:
    """A layout in a few words."""
    layout = step.layout
    if step.hardware.accelerator.kind == "cpu":
        text = f"{step.threads} thread{'s' if step.threads > 1 else ''}"
    else:
        parts = [
            f"{n}{v}"
            for n, v in (
                ("dp", layout.dp_replicate),
                ("fsdp", layout.dp_shard),
                ("tp", layout.tp),
                ("cp", layout.cp),
                ("pp", layout.pp),
            )
            if v > 1
        ]
        text = f"{layout.nodes}x{layout.devices // layout.nodes} {' '.join(parts)}".strip()
    if step.node.work.mode == "train":
        text += f" mb{layout.micro_batch}x{layout.grad_accum} {layout.precision}"
        if layout.recompute != "none":
            text += f" recompute {layout.recompute}"
    return text
