"""The same plan on other accelerators: what each would take and cost, side by side.

In: a Plan and names of accelerators. Out: rows of famc.whatif, that of the spec's own backends among them. Every backend with
accelerators gets the other chip, and keeps its nodes; where the spec has only CPUs, one node of it does all. Bears no identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from famc.backend import Accelerator, UnknownAccelerator, load_accelerator
from famc.errors import FitError, UsageError, did_you_mean
from famc.graph import Graph
from famc.plan import Plan, Planned, plan
from famc.planning import Timetable, timetable
from famc.schedule import Objective
from famc.spec.family import BackendUse
from famc.whatif import Row, Total, compare

ITSELF = "as in the spec"


def alternatives(
    made: Plan, chips: Sequence[str], objective: Objective | None = None, seconds: float = 0.0
) -> tuple[Row, ...]:
    """Rows, best first by the objective (default: the soonest end). `seconds`: for CP-SAT, for each.

    UsageError for an accelerator that famc doesn't know, or one that is named twice.
    """
    found = [_chip(name, made.graph.spec.folder) for name in chips]
    names = [chip.name for chip in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{', '.join(twice)} is compared twice", "name each accelerator once")
    totals = [_total(ITSELF, made, objective, seconds)]
    for chip in found:
        try:
            other = plan(_on(made.graph, chip), made.out, names=list(made.steps))
        except FitError as error:
            lines = error.message.splitlines()
            more = f" (and {len(lines) - 1} more steps)" if len(lines) > 1 else ""
            totals.append(_unfit(chip.name, f"{lines[0]}{more}"))
            continue
        totals.append(_total(chip.name, other, objective, seconds))
    return compare(totals, objective)


def _chip(name: str, folder: Path) -> Accelerator:
    try:
        return load_accelerator(name, folder)
    except UnknownAccelerator as error:
        raise UsageError(f"no accelerator is called '{name}'", did_you_mean(name, error.candidates)) from None
    except (ValueError, OSError) as error:
        raise UsageError(f"accelerator '{name}' can't be read: {error}") from None


def _on(graph: Graph, chip: Accelerator) -> Graph:
    """The graph with other hardware. No step's key depends on it."""
    spec = graph.spec
    gone = {
        "gpu": None,
        "use": None,
        "cpu": None,
        "ram": None,
        "usd_per_gpu_hour": None,
        "usd_per_hour": None,
    }
    here = {"gpu": chip.name} if chip.kind == "gpu" else {"use": chip.name}
    uses = {name: use for name, use in spec.family.backends.items() if _accelerated(use, spec.folder)}
    if uses:
        changed = {name: use.model_copy(update={**gone, **here}) for name, use in uses.items()}
    else:
        alone = BackendUse(per_node=chip.per_node).model_copy(update=here)
        changed = dict.fromkeys(spec.family.backends or ("local",), alone)
    family = spec.family.model_copy(update={"backends": {**spec.family.backends, **changed}})
    return replace(graph, spec=replace(spec, family=family))


def _accelerated(use: BackendUse, folder: Path) -> bool:
    return use.gpu is not None or (use.use is not None and load_accelerator(use.use, folder).kind == "gpu")


def _total(name: str, made: Plan, objective: Objective | None, seconds: float) -> Total:
    try:
        found = timetable(made, objective, seconds)
    except FitError:  # a limit that can't be kept here: the row says by how much the best does not
        assert objective is not None
        found = timetable(made, Objective("cost" if objective.deadline is None else "time"), seconds)
    steps = found.plan.to_run
    energy = sum(step.energy_kwh for step in steps)
    return Total(
        name,
        found.schedule.makespan,
        _most_devices(found),
        sum(step.device_hours for step in steps),
        _usd(steps, spot=False),
        _usd(steps, spot=True),
        energy,
        sum(step.co2e_kg for step in steps),
    )


def _usd(steps: Sequence[Planned], *, spot: bool) -> float | None:
    """Of all steps; None where one runs on an accelerator without such a price. A CPU's hours cost what the spec says."""
    total = 0.0
    for step in steps:
        where = step.hardware
        known = where.accelerator.usd_per_hour
        price: float | None = where.usd_per_device_hour
        if where.accelerator.kind == "gpu":
            if spot:
                price = known.spot if known else None
            elif where.price_basis == "none known":
                price = None
        if price is None:
            return None
        total += step.device_hours * price
    return total


def _most_devices(found: Timetable) -> int:
    """Accelerators in use at once, at most; of CPUs alone: hosts."""
    steps = found.plan.steps
    kinds = {step.hardware.accelerator.kind for step in found.plan.to_run}
    kind = "gpu" if "gpu" in kinds else "cpu"
    changes: list[tuple[float, int]] = []
    for placed in found.schedule.placed:
        if placed.option is not None and steps[placed.name].hardware.accelerator.kind == kind:
            devices = steps[placed.name].layout.devices
            changes += [(placed.start, devices), (placed.end, -devices)]
    if kind == "cpu":
        return len({step.hardware.name for step in found.plan.to_run})
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def _unfit(name: str, reason: str) -> Total:
    return Total(name, 0.0, 0, 0.0, None, None, 0.0, fits=False, reason=reason)
