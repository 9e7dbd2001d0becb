"""Tasks, pools and an objective -> Schedule: the heuristic always, CP-SAT where seconds are given for it.

In: plain data. Out: plain data. The same answer each time. Raises ValueError for tasks that are no problem at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from famc.schedule import exact
from famc.schedule.bounds import least_cost, least_time, within
from famc.schedule.greedy import EFFORT, greedy
from famc.schedule.place import Timed, latest
from famc.schedule.problem import Instance, Objective, Placed, Schedule, Task, TooWide, instance
from famc.schedule.rank import ROUNDING, kept, rank
from famc.schedule.relax import relaxations

QUICK = EFFORT // 8  # the same where nothing is
TRIALS = 1000  # of all tasks, at most


def schedule(
    tasks: Sequence[Task],
    pools: Mapping[str, int],
    *,
    objective: Objective | None = None,
    seconds: float = 0.0,
) -> Schedule:
    """The best schedule found of `tasks` on `pools` (name -> units).

    Without `seconds` a heuristic finds it: some milliseconds for a hundred tasks. With them CP-SAT improves on that for about
    so long, where OR-tools is installed and the problem is not too large for it (`note` says so). Costs are of the options
    that are taken: idle units cost nothing.

    Without an objective: the soonest end. ValueError for a name twice, an unknown need or pool, needs in a circle, units below
    1, and seconds or costs that are negative or not finite.
    """
    objective = objective or Objective()
    try:
        whole = instance(tasks, dict(pools))
    except TooWide as wide:
        return Schedule(
            (), 0.0, 0.0, 0.0, (), 0.0, 0.0, "greedy", "infeasible", f"no pool is large enough: {wide}"
        )
    found = _solve(whole, objective, seconds)
    if found.status in ("infeasible", "unknown"):
        found = _explained(whole, objective, found, seconds)
    return _shown(tasks, whole, objective, found)


@dataclass(frozen=True, slots=True)
class _Found:
    """`timed`: within the limits if the status says so, else the nearest found, or None. `bound`: of what is minimised."""

    timed: Timed | None
    bound: float
    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    solver: Literal["greedy", "cp-sat"] = "greedy"
    note: str = ""
    reason: str = ""
    least_seconds: float | None = None
    least_usd: float | None = None


def _solve(whole: Instance, objective: Objective, seconds: float) -> _Found:
    """One objective, without a word on why it fails."""
    left, lost = within(whole, objective.deadline, objective.budget)
    if lost or (objective.budget is not None and least_cost(whole) > objective.budget * (1 + ROUNDING)):
        return _Found(None, 0.0, "infeasible")
    wanted, cheapest = objective, None
    if objective.goal == "cost" and objective.deadline is None:
        # each task at its cheapest: what is left to choose is when, and which of those that cost the same
        cheapest = least_cost(left)
        left, _ = within(left, None, cheapest)
        wanted = replace(objective, minimize="time")
    relaxed = relaxations(left, wanted)
    soonest = max(least_time(left), relaxed.fast.bound)
    bound = max(relaxed.bound(wanted), soonest if wanted.goal == "time" else least_cost(left))
    in_time, in_money = (bound, least_cost(left)) if wanted.goal == "time" else (soonest, bound)
    for least, limit in ((in_time, objective.deadline), (in_money, objective.budget)):
        if limit is not None and least > limit * (1 + ROUNDING):
            return _Found(None, 0.0, "infeasible")
    asked = seconds > 0 or objective != Objective()
    timed = greedy(left, wanted, relaxed, soonest, min(EFFORT if asked else QUICK, TRIALS * len(left)))
    solved, note = None, ""
    if seconds > 0 and not _settled(left, wanted, timed, bound):
        size = sum(len(c) for c in left.choices)
        if size > exact.CHOICES:
            note = f"{size} options: CP-SAT would be slow with more than {exact.CHOICES}"
        else:
            try:
                solved = exact.solve(left, wanted, timed, bound, seconds)
            except exact.Missing:
                note = "OR-tools is not installed: pip install ortools"
    proven = False
    if solved is not None:
        if solved.excluded:
            return _Found(timed, 0.0, "infeasible", "cp-sat")
        bound, proven, timed = solved.bound, solved.optimal, solved.timed or timed
    solver: Literal["greedy", "cp-sat"] = "greedy" if solved is None else "cp-sat"
    if not kept(objective, timed):
        return _Found(timed, bound, "unknown", solver, note)
    if cheapest is not None:
        return _Found(timed, cheapest, "optimal", solver, note)
    value = timed.makespan if wanted.goal == "time" else timed.cost
    proven = proven or value <= bound * (1 + ROUNDING)
    return _Found(timed, bound, "optimal" if proven else "feasible", solver, note)


def _settled(left: Instance, wanted: Objective, timed: Timed, bound: float) -> bool:
    """Whether the heuristic's schedule can't be better in anything."""
    if not kept(wanted, timed):
        return False
    if wanted.goal == "time":
        return timed.makespan <= bound * (1 + ROUNDING) and timed.cost <= least_cost(left) * (1 + ROUNDING)
    return timed.cost <= bound * (1 + ROUNDING) and timed.makespan <= least_time(left) * (1 + ROUNDING)


def _explained(whole: Instance, objective: Objective, failed: _Found, seconds: float) -> _Found:
    """Which limit fails, and what can be reached: the same with one limit left out, or both. Where that search comes upon a
    schedule within the limits, that is the answer."""
    deadline, budget = objective.deadline, objective.budget
    quickest = _solve(whole, Objective("time"), seconds)
    soonest = quickest if budget is None else _solve(whole, Objective("time", budget=budget), seconds)
    cheapest = failed if budget is None else _solve(whole, Objective("cost", deadline=deadline), seconds)
    for other in (soonest, cheapest):
        if other.timed is not None and kept(objective, other.timed):
            return replace(failed, timed=other.timed, status="feasible", solver=other.solver)
    assert quickest.timed is not None  # without limits there is always one
    near = [f.timed for f in (soonest, cheapest, failed, quickest) if f.timed is not None]
    least_seconds = soonest.timed.makespan if soonest.timed and soonest.status in _KEPT else None
    least_usd = cheapest.timed.cost if cheapest.timed and cheapest.status in _KEPT else None
    floor = least_cost(whole)
    text: list[str] = []
    if budget is not None and least_seconds is None:
        text.append(f"the budget of {_usd(budget)} can't be kept: the cheapest of all costs {_usd(floor)}")
    if deadline is not None and least_usd is None:
        least = f"the soonest end found is {_time(quickest.timed.makespan)}"
        if quickest.bound < quickest.timed.makespan * (1 - 1e-4):
            least += f", and none is before {_time(quickest.bound)}"
        excluded = quickest.bound > deadline * (1 + ROUNDING) or (
            budget is None and failed.status == "infeasible"
        )
        verb = "can't be kept" if excluded else "was not reached"
        text.append(f"the deadline of {_time(deadline)} {verb}: {least}")
    if not text and deadline is not None and budget is not None:
        assert least_seconds is not None
        assert least_usd is not None
        verb = "can't both be kept" if failed.status == "infeasible" else "were not both reached"
        text.append(
            f"the deadline of {_time(deadline)} and the budget of {_usd(budget)} {verb}: for that money"
            f" the soonest end found is {_time(least_seconds)}, until then the cheapest found costs {_usd(least_usd)}"
        )
    return replace(
        failed,
        timed=min(near, key=lambda t: rank(objective, t)),
        reason="; ".join(text),
        least_seconds=least_seconds,
        least_usd=least_usd,
    )


_KEPT = ("optimal", "feasible")


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds:.4g} s"


def _usd(value: float) -> str:
    if 0 < value < 1:
        return f"{value:.2g} USD"
    return f"{value:,.2f} USD" if value < 1000 else f"{value:,.0f} USD"


# --- the answer -----------------------------------------------------------------------------------------------------


def _shown(tasks: Sequence[Task], whole: Instance, objective: Objective, found: _Found) -> Schedule:
    timed = found.timed
    assert timed is not None
    tiny = ROUNDING * timed.makespan
    slack = [max(0.0, late - start) for late, start in zip(latest(whole, timed), timed.starts, strict=True)]
    slack = [0.0 if s <= tiny else s for s in slack]
    ended: dict[tuple[int, float], list[int]] = {}
    for i, choice in enumerate(timed.chosen):
        if choice is not None and choice.seconds > 0:
            ended.setdefault((choice.pool, timed.ends[i]), []).append(i)
    placed: list[Placed] = []
    after: list[int] = []
    for i, task in enumerate(tasks):
        choice, start = timed.chosen[i], timed.starts[i]
        before = [n for n in whole.needs[i] if timed.ends[n] == start] if start > 0 else []
        waits: Literal["", "needs", "pool"] = "needs" if before else ""
        if start > 0 and not before and choice is not None:
            before, waits = ended[choice.pool, start], "pool"
        after.append(min(before, key=lambda n: (slack[n], n)) if before else -1)
        placed.append(
            Placed(
                task.name,
                None if choice is None else task.options[choice.at],
                start,
                timed.ends[i],
                slack[i],
                tasks[after[i]].name if before else "",
                waits,
            )
        )
    value = timed.makespan if objective.goal == "time" else timed.cost
    bound = min(found.bound, value)
    return Schedule(
        tuple(placed),
        timed.makespan,
        timed.cost,
        sum(p.option.device_hours for p in placed if p.option is not None),
        _critical(placed, after, timed),
        bound,
        (value - bound) / value if value > 0 and found.status in _KEPT else 0.0,
        found.solver,
        found.status,
        found.reason,
        found.least_seconds,
        found.least_usd,
        found.note,
    )


def _critical(placed: Sequence[Placed], after: Sequence[int], timed: Timed) -> tuple[str, ...]:
    """The chain of tasks, each started by the end of the one before it, that ends last. Those with nothing to run are left
    out."""
    at = max(range(len(placed)), key=lambda i: timed.ends[i], default=-1)
    chain: list[Placed] = []
    while at >= 0:
        chain.append(placed[at])
        at = after[at]
    return tuple(p.name for p in reversed(chain) if p.option is not None)
