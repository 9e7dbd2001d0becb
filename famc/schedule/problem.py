"""What is scheduled, and the answer: plain data.

In: the caller's tasks, pools and objective. Out: Schedule. Costs are of devices while a task holds them: a pool's idle units
cost nothing. Bears no identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Goal = Literal["cost", "time"]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a task: on `units` of a pool (nodes, devices or threads) for `seconds`. `devices`: of all those units,
    None for one each. `index` and `label` are the caller's own: which layout this is, and how it is called."""

    pool: str
    units: int
    seconds: float
    cost_usd: float = 0.0
    devices: int | None = None
    index: int = 0
    label: str = ""

    @property
    def device_hours(self) -> float:
        return (self.units if self.devices is None else self.devices) * self.seconds / 3600


@dataclass(frozen=True, slots=True)
class Task:
    """One step. `needs`: names of the tasks that must have ended. Without options there is nothing to run (a cached step):
    it ends when its needs have."""

    name: str
    needs: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()


@dataclass(frozen=True, slots=True)
class Objective:
    """What is wanted. `minimize` None: the cost where there is a deadline and no budget, else the time. Of schedules that
    are equal in it, the one that is better in the other is taken. `deadline` in seconds, `budget` in USD."""

    minimize: Goal | None = None
    deadline: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.deadline is not None and not (self.deadline > 0 and math.isfinite(self.deadline)):
            raise ValueError(f"a deadline of {self.deadline} seconds: it must be above 0")
        if self.budget is not None and not (self.budget >= 0 and math.isfinite(self.budget)):
            raise ValueError(f"a budget of {self.budget} USD: it must be at least 0")

    @property
    def goal(self) -> Goal:
        if self.minimize is not None:
            return self.minimize
        return "cost" if self.deadline is not None and self.budget is None else "time"


@dataclass(frozen=True, slots=True)
class Placed:
    """A task in a schedule: seconds from its begin. `option` None: nothing to run. `slack`: seconds it may start later with
    the makespan unchanged, as may all others, each with its option. `after`: the task whose end lets it start (empty: none),
    and `waits`: whether that is one of its needs or one that held its pool."""

    name: str
    option: Option | None
    start: float
    end: float
    slack: float
    after: str = ""
    waits: Literal["", "needs", "pool"] = ""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When each task runs, and how. `placed` is in the order of the tasks given.

    `lower_bound`: no schedule within the limits takes (costs) less: seconds where time is minimised, USD where cost is.
    `gap`: how far above it this one may lie, a share of its own value. `status` optimal: proven of what is minimised, to one
    part in 10,000; feasible: within the limits; infeasible: proven that no schedule keeps them; unknown: none was found, and
    none excluded. With the last two, `reason` says which limit fails, `least_seconds` and `least_usd` are the least found
    with the other limit kept (None where that fails too), `gap` is 0, and `placed` is the schedule found that comes nearest;
    it is empty where a task fits no pool. `note`: why it is not CP-SAT's, where that was asked for.
    """

    placed: tuple[Placed, ...]
    makespan: float
    cost_usd: float
    device_hours: float
    critical_path: tuple[str, ...]
    lower_bound: float
    gap: float
    solver: Literal["greedy", "cp-sat"]
    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    reason: str = ""
    least_seconds: float | None = None
    least_usd: float | None = None
    note: str = ""

    def __getitem__(self, name: str) -> Placed:
        """The task called `name`. KeyError where there is none."""
        for one in self.placed:
            if one.name == name:
                return one
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Choice:
    """An option with its pool's number; `at` is its place among the task's options."""

    pool: int
    units: int
    seconds: float
    cost: float
    at: int


@dataclass(frozen=True, slots=True)
class Instance:
    """A problem by numbers: tasks in the caller's order; `order` puts each behind its needs, as early as the caller has it."""

    needs: tuple[tuple[int, ...], ...]
    followers: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    choices: tuple[tuple[Choice, ...], ...]  # of each task; empty: nothing to run
    capacity: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.needs)


class TooWide(Exception):
    """Tasks none of whose options fits its pool: (name, the option of least units, the pool's units)."""

    def __init__(self, tasks: Sequence[tuple[str, Option, int]]) -> None:
        self.tasks = tuple(tasks)
        super().__init__("; ".join(f"{n} needs {o.units} of {o.pool}, which has {m}" for n, o, m in tasks))


def instance(tasks: Sequence[Task], pools: dict[str, int]) -> Instance:
    """The problem by numbers, without options that are wider than their pool or no better than another one in anything.

    ValueError for a name twice, a need or a pool that is not there, needs in a circle, units below 1, and seconds or costs
    that are negative or not finite. TooWide where a task has no option left.
    """
    numbers = {name: i for i, name in enumerate(pools)}
    index: dict[str, int] = {}
    for i, task in enumerate(tasks):
        if task.name in index:
            raise ValueError(f"{task.name} is scheduled twice")
        index[task.name] = i
    needs: list[tuple[int, ...]] = []
    choices: list[tuple[Choice, ...]] = []
    wide: list[tuple[str, Option, int]] = []
    for task in tasks:
        for need in task.needs:
            if need not in index:
                raise ValueError(f"{task.name} needs {need}, which is not among the tasks")
        needs.append(tuple(dict.fromkeys(index[need] for need in task.needs)))
        for option in task.options:
            _check(task.name, option, pools)
        fitting = [
            Choice(numbers[o.pool], o.units, o.seconds, o.cost_usd, at)
            for at, o in enumerate(task.options)
            if o.units <= pools[o.pool]
        ]
        if task.options and not fitting:
            least = min(task.options, key=lambda o: o.units / max(1, pools[o.pool]))
            wide.append((task.name, least, pools[least.pool]))
        choices.append(tuple(c for c in fitting if not any(_beats(o, c) for o in fitting)))
    order, followers = _sorted(needs, [t.name for t in tasks])
    if wide:
        raise TooWide(wide)
    return Instance(tuple(needs), followers, order, tuple(choices), tuple(pools.values()))


def _check(name: str, option: Option, pools: dict[str, int]) -> None:
    if option.pool not in pools:
        raise ValueError(f"{name} runs on pool {option.pool}; there are: {', '.join(pools) or 'none'}")
    if option.units < 1:
        raise ValueError(f"{name} runs on {option.units} units of {option.pool}: it must be at least 1")
    for value, unit in ((option.seconds, "seconds"), (option.cost_usd, "USD")):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(
                f"{name} on {option.pool} takes {value} {unit}: it must be at least 0 and finite"
            )


def _beats(one: Choice, other: Choice) -> bool:
    """Whether `one` makes `other` needless: nowhere worse, and better somewhere or named before it."""
    if one is other or one.pool != other.pool:
        return False
    a, b = (one.units, one.seconds, one.cost), (other.units, other.seconds, other.cost)
    return all(x <= y for x, y in zip(a, b, strict=True)) and (a != b or one.at < other.at)


def _sorted(
    needs: Sequence[tuple[int, ...]], names: Sequence[str]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Topological order, the caller's where that is one already; and who needs whom."""
    followers: list[list[int]] = [[] for _ in needs]
    for i, own in enumerate(needs):
        for need in own:
            followers[need].append(i)
    state = [0] * len(needs)  # 0 not seen, 1 its needs are being put before it, 2 done
    order: list[int] = []
    for root in range(len(needs)):
        stack = [root]
        while stack:
            i = stack[-1]
            if state[i] == 0:
                state[i] = 1
                for need in reversed(needs[i]):
                    if state[need] == 1:
                        raise ValueError(f"{names[i]} and {names[need]} need each other")
                    if state[need] == 0:
                        stack.append(need)
            else:
                stack.pop()
                if state[i] == 1:
                    state[i] = 2
                    order.append(i)
    return tuple(order), tuple(tuple(f) for f in followers)
