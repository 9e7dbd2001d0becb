"""The same by OR-tools CP-SAT: optional intervals, one of each task's options, a cumulative constraint for each pool.

In: an Instance, an Objective, a schedule to begin with. Out: a better one, and a bound. OR-tools is imported when asked for
only: it takes 0.6 s. One worker, a fixed seed and a limit in the solver's own deterministic time: the same answer each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any

from famc.schedule.bounds import windows, within
from famc.schedule.place import Timed, by_start, justify, place
from famc.schedule.problem import Choice, Instance, Objective
from famc.schedule.rank import ROUNDING, kept, rank

CHOICES = 6000  # above, building the model alone takes seconds
TICKS = 10_000_000  # of the horizon, where seconds are multiples of no rounder unit
SECONDS = (86400.0, 3600.0, 60.0, 1.0, 0.1, 0.01, 0.001)
CENTS = 1_000_000_000  # the same of the dearest choices
DOLLARS = (1000.0, 1.0, 0.01, 0.0001)
FIRST = 0.7  # of the seconds for what is minimised, the rest for the other
# The solver's deterministic units for a second: one took 4 to 10 seconds on a loaded cloud core.
DETERMINISTIC = 0.12
PATIENCE = 3.0  # a machine so many times slower is cut off, and its answer may then differ


class Missing(Exception):
    """OR-tools is not installed."""


@dataclass(frozen=True, slots=True)
class Solved:
    """`timed` None: none found. `bound`: of what is minimised. `optimal`: proven; `excluded`: proven that there is none."""

    timed: Timed | None
    bound: float
    optimal: bool
    excluded: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """Numbers as whole multiples of `tick`, rounded up. `slop`: ticks by which that may lengthen a sum of one a task; 0 where
    nothing is rounded."""

    tick: float
    slop: int = 0

    def up(self, value: float) -> int:
        """The multiple that is not below `value`."""
        return ceil(value / self.tick - 1e-6)

    def down(self, value: float) -> int:
        """The multiple that is not above it."""
        return floor(value / self.tick + 1e-6)


def grid(values: Sequence[float], tasks: int, most: float, units: Sequence[float], ticks: int) -> Grid:
    """The coarsest of `units` of which all values are multiples, cutting `most` into `ticks` at most; else `most` / `ticks`."""
    for unit in units:
        if most <= unit * ticks and all(abs(v / unit - round(v / unit)) < 1e-6 for v in values):
            return Grid(unit)
    return Grid(most / ticks or 1.0, tasks)


def solve(instance: Instance, objective: Objective, hint: Timed, bound: float, seconds: float) -> Solved:
    """The best schedule within the limits, searched for about `seconds`: first for what is minimised, then, that kept, for the
    other.

    `hint`: a schedule, within the limits unless none is known. `bound`: of what is minimised; where the hint reaches it, only
    the other is searched for. Missing without OR-tools.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise Missing from error

    fast, fits = objective.goal == "time", kept(objective, hint)
    longest = hint.makespan if fast and fits else objective.deadline
    assert longest is not None  # only a deadline can be missed by every schedule found
    instance, _ = within(instance, longest, objective.budget)
    own = [c for cs in instance.choices for c in cs]
    dearest = sum(max((c.cost for c in cs), default=0.0) for cs in instance.choices)
    time = grid([c.seconds for c in own], len(instance), longest, SECONDS, TICKS)
    money = grid([c.cost for c in own], len(instance), dearest, DOLLARS, CENTS)
    ticked = replace(
        instance,
        choices=tuple(
            tuple(replace(c, seconds=float(time.up(c.seconds)), cost=float(money.up(c.cost))) for c in cs)
            for cs in instance.choices
        ),
    )
    model = _Model(cp_model, ticked, time.down(longest) + time.slop)
    if objective.budget is not None:
        model.cp.add(model.cost <= money.down(objective.budget) + money.slop)
    measure = time if fast else money
    first, second = (model.span, model.cost) if fast else (model.cost, model.span)
    found, value = (hint, hint.makespan if fast else hint.cost) if fits else (None, 0.0)
    begin = _begin(ticked, instance, hint) if fits else None
    proven = fits and value <= bound * (1 + ROUNDING)
    share = 1.0 if model.priceless else FIRST
    if not proven:
        told = model.search(first, begin, seconds * share)
        if told.excluded:
            return Solved(None, bound, optimal=False, excluded=True)
        bound = max(bound, (told.bound - measure.slop) * measure.tick)
        proven = told.optimal
        if told.chosen:
            begin = told
            found = _better(objective, found, _timed(instance, told))
    if begin is not None and not (fast and model.priceless):
        model.cp.add(first <= begin.value(fast))
        told = model.search(second, begin, seconds * (1 - FIRST))
        if told.chosen:
            found = _better(objective, found, _timed(instance, told))
    return Solved(found, bound, proven)


@dataclass(frozen=True, slots=True)
class _Told:
    """A schedule in ticks as the solver has it (`chosen`: places among each task's choices, -1 for none; empty: no
    schedule), and what it proved."""

    chosen: tuple[int, ...]
    starts: tuple[int, ...]
    span: int
    cost: int
    bound: float = 0.0
    optimal: bool = False
    excluded: bool = False

    def value(self, fast: bool) -> int:
        return self.span if fast else self.cost


class _Model:
    """The problem in CP-SAT's words, in ticks. `span`, `cost`: expressions of the makespan and the cost."""

    def __init__(self, cp_model: Any, ticked: Instance, horizon: int) -> None:
        self.solver, self.cp, self.ticked = cp_model, cp_model.CpModel(), ticked
        cp, seen = self.cp, windows(ticked)
        fastest = [min((int(c.seconds) for c in cs), default=0) for cs in ticked.choices]
        self.starts, self.literals, ends = [], [], []
        rooms: list[list[tuple[Any, int]]] = [[] for _ in ticked.capacity]
        work: list[list[Any]] = [[] for _ in ticked.capacity]
        for i, choices in enumerate(ticked.choices):
            head, last = int(seen.heads[i]), horizon - int(seen.tails[i])
            start = cp.new_int_var(head, max(head, last - fastest[i]), "")
            end = cp.new_int_var(head + fastest[i], max(head + fastest[i], last), "")
            literals = [cp.new_bool_var("") for _ in choices]
            if literals:
                cp.add_exactly_one(literals)
            cp.add(end == start + sum(int(c.seconds) * b for c, b in zip(choices, literals, strict=True)))
            for choice, literal in zip(choices, literals, strict=True):
                size = int(choice.seconds)
                if size:
                    interval = cp.new_optional_interval_var(start, size, end, literal, "")
                    rooms[choice.pool].append((interval, choice.units))
                    work[choice.pool].append(size * choice.units * literal)
            self.starts.append(start)
            self.literals.append(literals)
            ends.append(end)
        for i, needs in enumerate(ticked.needs):
            for need in needs:
                cp.add(self.starts[i] >= ends[need])
        self.span = cp.new_int_var(0, horizon, "")
        for i, end in enumerate(ends):
            if not ticked.followers[i]:
                cp.add(self.span >= end)
        for pool, own in enumerate(rooms):
            if own:
                cp.add_cumulative(
                    [interval for interval, _ in own], [u for _, u in own], ticked.capacity[pool]
                )
                cp.add(self.span * ticked.capacity[pool] >= sum(work[pool]))
        # no choice changes the cost: nothing to search for in it
        self.priceless = all(len({c.cost for c in cs}) < 2 for cs in ticked.choices)
        self.cost = sum(
            int(c.cost) * b
            for cs, literals in zip(ticked.choices, self.literals, strict=True)
            for c, b in zip(cs, literals, strict=True)
        )

    def search(self, objective: Any, begin: _Told | None, seconds: float) -> _Told:
        """Minimise `objective`, from the schedule `begin`."""
        cp = self.cp
        cp.clear_hints()
        if begin is not None:
            for start, literals, at, chosen in zip(
                self.starts, self.literals, begin.starts, begin.chosen, strict=True
            ):
                cp.add_hint(start, at)
                for number, literal in enumerate(literals):
                    cp.add_hint(literal, number == chosen)
        cp.minimize(objective)
        solver = self.solver.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.interleave_search = True  # large neighbourhoods too, in turn on the one worker
        solver.parameters.random_seed = 0
        solver.parameters.max_deterministic_time = seconds * DETERMINISTIC
        solver.parameters.max_time_in_seconds = seconds * PATIENCE
        status = solver.solve(cp)
        if status == self.solver.INFEASIBLE:
            return _Told((), (), 0, 0, excluded=True)
        if status not in (self.solver.OPTIMAL, self.solver.FEASIBLE):
            return _Told((), (), 0, 0, solver.best_objective_bound)
        return _Told(
            tuple(
                next((k for k, b in enumerate(literals) if solver.boolean_value(b)), -1)
                for literals in self.literals
            ),
            tuple(solver.value(start) for start in self.starts),
            solver.value(self.span),
            int(solver.value(self.cost)),
            solver.best_objective_bound,
            status == self.solver.OPTIMAL,
        )


def _begin(ticked: Instance, instance: Instance, timed: Timed) -> _Told:
    """A schedule in ticks: its options and its order."""
    at = tuple(-1 if c is None else instance.choices[i].index(c) for i, c in enumerate(timed.chosen))
    chosen = [None if k < 0 else ticked.choices[i][k] for i, k in enumerate(at)]
    placed = place(ticked, chosen, by_start(instance, timed.starts))
    return _Told(at, tuple(int(s) for s in placed.starts), int(placed.makespan), int(placed.cost))


def _timed(instance: Instance, told: _Told) -> Timed:
    """The solver's options and order, in seconds: no task starts later than its ticks say."""
    chosen: list[Choice | None] = [
        None if k < 0 else instance.choices[i][k] for i, k in enumerate(told.chosen)
    ]
    return justify(instance, place(instance, chosen, by_start(instance, told.starts)))


def _better(objective: Objective, one: Timed | None, other: Timed) -> Timed | None:
    """The better of two within the limits."""
    if not kept(objective, other):
        return one
    if one is None or rank(objective, other) < rank(objective, one):
        return other
    return one
