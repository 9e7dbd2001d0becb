"""The linear relaxation of a schedule: how long and how dear it is at least, and the options that come near to that.

In: an Instance, an Objective. Out: bounds that hold for every schedule, and choices for the heuristic to place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from famc.schedule.place import Prices
from famc.schedule.problem import Choice, Instance, Objective

ROUNDS = 40
FAST_ROUNDS = 160  # of the time alone, the bound that most plans print
CLOSE = 1e-3  # a relaxation is good enough where its bound is this near to what its choices reach
PRICES = 12  # of time, between which that of a limit is searched


@dataclass(frozen=True, slots=True)
class Relaxed:
    """`bound`: of cost_weight x cost + time_weight x makespan. `choices`: those that come nearest to it first, each once.
    `longest`, `cost`: of the first; its critical path or a pool's work over its units, whichever is longer. `prices`: the
    game's last."""

    bound: float
    choices: tuple[tuple[Choice | None, ...], ...]
    longest: float
    cost: float
    prices: Prices


def relax(instance: Instance, cost_weight: float, time_weight: float, rounds: int = ROUNDS) -> Relaxed:
    """The linear relaxation of min cost_weight x cost + time_weight x max(critical path, work / units of each pool), which is
    the allotment problem of Lepère, Trystram & Woeginger 2002 (doi:10.1142/S0129054102001308) with prices and several pools.

    A game: one side picks each task's option against prices of time on the paths and on the pools; the other prices the
    longest path or the fullest pool of that pick; prices are the mean of its moves so far. For all prices the best picks' sum
    is a lower bound (weak duality), and it converges to the relaxation's optimum (Robinson 1951, doi:10.2307/1969530).
    """
    n, pools = len(instance), len(instance.capacity)
    on_path = [0.0] * n  # price of a second of a task
    on_pool = [0.0] * pools  # and of a unit and second of a pool
    best, known = 0.0, dict[tuple[Choice | None, ...], tuple[float, float, float]]()
    for k in range(rounds):
        total = 0.0
        picked: list[Choice | None] = [None] * n
        for i, choices in enumerate(instance.choices):
            if not choices:
                continue
            least, path = -1.0, on_path[i]
            for c in choices:
                value = cost_weight * c.cost + time_weight * c.seconds * (path + on_pool[c.pool] * c.units)
                if least < 0 or value < least:
                    least, picked[i] = value, c
            total += least
        best = max(best, total)
        length, path_tasks = longest_path(instance, picked)
        load = [0.0] * pools
        for one in picked:
            if one is not None:
                load[one.pool] += one.units * one.seconds / instance.capacity[one.pool]
        fullest = max(range(pools), key=lambda p: load[p], default=-1)
        most = max(length, load[fullest]) if pools else length
        paid = sum(c.cost for c in picked if c is not None)
        known.setdefault(tuple(picked), (cost_weight * paid + time_weight * most, most, paid))
        reached = min(known.values())[0]
        if best >= reached * (1 - CLOSE):
            break
        step = 1 / (k + 1)
        on_path = [x * (1 - step) for x in on_path]
        on_pool = [x * (1 - step) for x in on_pool]
        if pools and load[fullest] >= length:
            on_pool[fullest] += step / instance.capacity[fullest]
        else:
            for i in path_tasks:
                on_path[i] += step
    ranked = sorted(known.items(), key=lambda item: item[1])
    _, longest, paid = ranked[0][1]
    prices = Prices(tuple(on_path), tuple(on_pool), time_weight, cost_weight)
    return Relaxed(best, tuple(choice for choice, _ in ranked), longest, paid, prices)


def longest_path(instance: Instance, chosen: Sequence[Choice | None]) -> tuple[float, list[int]]:
    """Seconds of the longest chain of needs, and its tasks."""
    ends = [0.0] * len(instance)
    before = [-1] * len(instance)
    last = -1
    for i in instance.order:
        start = 0.0
        for need in instance.needs[i]:
            if ends[need] > start:
                start, before[i] = ends[need], need
        choice = chosen[i]
        ends[i] = start if choice is None else start + choice.seconds
        if last < 0 or ends[i] > ends[last]:
            last = i
    path: list[int] = []
    at = last
    while at >= 0:
        path.append(at)
        at = before[at]
    return (ends[last] if last >= 0 else 0.0), path[::-1]


@dataclass(frozen=True, slots=True)
class Relaxations:
    """Of the time alone, and of cost + price x time at several prices (USD a second), where a limit asks for a trade."""

    fast: Relaxed
    priced: tuple[tuple[float, Relaxed], ...] = ()

    def bound(self, objective: Objective) -> float:
        """Of what is minimised, under the limit on the other. With h(price) the least of cost + price x time: cost >= h -
        price x deadline, and time >= (h - budget) / price, for every price (Lagrange)."""
        if objective.goal == "time":
            found = [self.fast.bound]
            if objective.budget is not None:
                found += [(r.bound - objective.budget) / price for price, r in self.priced]
        else:
            found = [0.0]
            if objective.deadline is not None:
                found += [r.bound - price * objective.deadline for price, r in self.priced]
        return max(found)


def relaxations(instance: Instance, objective: Objective) -> Relaxations:
    """The price is quartered or quadrupled until the limit (the deadline of a cheapest, the budget of a fastest schedule) lies
    between two, then their interval is halved."""
    fast = relax(instance, 0.0, 1.0, FAST_ROUNDS)
    limit = objective.deadline if objective.goal == "cost" else objective.budget
    cheapest = cheapest_choices(instance)
    slow = _longest(instance, cheapest)
    paid = sum(c.cost for c in cheapest if c is not None)
    if limit is None or fast.cost <= paid or slow <= fast.longest:
        return Relaxations(fast)
    price, low, high = (fast.cost - paid) / (slow - fast.longest), 0.0, inf
    found: list[tuple[float, Relaxed]] = []
    for _ in range(PRICES):
        relaxed = relax(instance, 1.0, price)
        found.append((price, relaxed))
        faster = relaxed.longest > limit if objective.goal == "cost" else relaxed.cost <= limit
        low, high = (price, high) if faster else (low, price)
        price = price / 4 if low == 0 else price * 4 if high == inf else (low * high) ** 0.5
    return Relaxations(fast, tuple(found))


def cheapest_choices(instance: Instance) -> tuple[Choice | None, ...]:
    """Each task's option of least cost; of such, the fastest."""
    return tuple(min(c, key=lambda o: (o.cost, o.seconds), default=None) for c in instance.choices)


def fastest_choices(instance: Instance) -> tuple[Choice | None, ...]:
    """Each task's option of least seconds; of such, the cheapest."""
    return tuple(min(c, key=lambda o: (o.seconds, o.cost), default=None) for c in instance.choices)


def _longest(instance: Instance, chosen: Sequence[Choice | None]) -> float:
    """The critical path, or a pool's work over its units, whichever is longer."""
    load = [0.0] * len(instance.capacity)
    for c in chosen:
        if c is not None:
            load[c.pool] += c.units * c.seconds / instance.capacity[c.pool]
    return max([longest_path(instance, chosen)[0], *load])
