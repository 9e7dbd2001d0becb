"""A schedule made better: other options of single tasks, other prices, other orders.

In: an Instance, an Objective, a Timed. Out: one that is no worse. `effort` is in tasks placed, so that no clock decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from famc.schedule.place import Timed, by_start, by_tail, justify, latest, place, place_priced
from famc.schedule.problem import Choice, Instance, Objective
from famc.schedule.rank import ROUNDING, key, rank
from famc.schedule.relax import Relaxed

SPREAD = 0.3  # of the priorities that are tried beside the longest chain's own


def improved(instance: Instance, objective: Objective, timed: Timed, effort: int) -> Timed:
    """One task's option after the other is changed, and kept where the schedule is better."""
    best = rank(objective, timed)
    while effort > 0:
        before = best
        slack = [late - start for late, start in zip(latest(instance, timed), timed.starts, strict=True)]
        for i, choice in _moves(instance, objective, timed, slack):
            own = timed.chosen[i]
            if effort <= 0 or own is None or choice is own:
                continue
            chosen = (*timed.chosen[:i], choice, *timed.chosen[i + 1 :])
            paid = timed.cost + choice.cost - own.cost
            if key(objective, 0.0, paid) >= best:
                continue  # dearer than it may be, however soon it ends
            effort -= len(instance)
            trial = place(instance, chosen, by_start(instance, timed.starts))
            if rank(objective, trial) < best:
                timed = justify(instance, trial)
                best = rank(objective, timed)
        if best == before:
            break
    return timed


def _moves(
    instance: Instance, objective: Objective, timed: Timed, slack: Sequence[float]
) -> list[tuple[int, Choice]]:
    """Other options that may help, most promising first: of a critical task one that is faster or takes less of its pool;
    of any task one that is cheaper, and no slower than its slack allows (with a deadline: and the deadline's)."""
    spare = max(0.0, objective.deadline - timed.makespan) if objective.deadline is not None else 0.0
    over, *_ = rank(objective, timed)
    hurry = objective.goal == "time" or over > 0
    tiny = ROUNDING * timed.makespan
    found: list[tuple[tuple[float, float], int, Choice]] = []
    for i, own in enumerate(timed.chosen):
        if own is None:
            continue
        critical = slack[i] <= tiny
        for c in instance.choices[i]:
            if c is own:
                continue
            longer, saved = c.seconds - own.seconds, own.cost - c.cost
            if critical and hurry and (longer < 0 or c.units * c.seconds < own.units * own.seconds):
                found.append(((0.0, min(longer, 0.0)), i, c))
            elif saved > 0 and longer <= slack[i] + spare + tiny:
                found.append(((1.0, -saved), i, c))
    return [(i, c) for _, i, c in sorted(found, key=lambda m: (m[0], m[1], m[2].at))]


def repriced(
    instance: Instance, objective: Objective, timed: Timed, guide: Relaxed, floor: float, effort: int
) -> Timed:
    """Other options and orders: the prices that went best, each task's scaled by chance of a fixed seed."""
    chance = Random(0)  # noqa: S311  (nothing here is secret)
    options = sum(len(c) for c in instance.choices)
    while effort > 0:
        scale = [2 ** (4 * chance.random() - 2) for _ in range(len(instance))]
        order = by_tail(instance, guide.choices[0], [1 + SPREAD * (2 * chance.random() - 1) for _ in scale])
        trial = place_priced(instance, order, guide.prices, floor * 4 ** (2 * chance.random() - 1), scale)
        effort -= options
        if trial.makespan < timed.makespan * (1 + SPREAD / 10):
            trial = justify(instance, trial)
            effort -= 2 * len(instance)
        if rank(objective, trial) < rank(objective, timed):
            timed = trial
    return timed


def resampled(instance: Instance, objective: Objective, timed: Timed, bound: float, effort: int) -> Timed:
    """The same options in other orders: priorities of the longest chain, each task's seconds scaled by chance of a fixed
    seed."""
    chance = Random(0)  # noqa: S311  (nothing here is secret)
    while effort > 0 and timed.makespan > bound * (1 + ROUNDING):
        scale = [1 + SPREAD * (2 * chance.random() - 1) for _ in range(len(instance))]
        trial = place(instance, timed.chosen, by_tail(instance, timed.chosen, scale))
        effort -= 2 * max(1, len(instance))
        if trial.makespan < timed.makespan * (1 + SPREAD / 10):
            trial = justify(instance, trial)
        if rank(objective, trial) < rank(objective, timed):
            timed = trial
    return timed


def reordered(instance: Instance, objective: Objective, timed: Timed, bound: float, effort: int) -> Timed:
    """The same options in other orders: a task that decides when all ends, and waits for room, goes (with all that it needs)
    before what holds its pool. So a wide task need not wait for a long and narrow one that could have run beside others."""
    best = rank(objective, timed)
    while effort > 0 and timed.makespan > bound * (1 + ROUNDING):
        before = best
        for task, front in _jumps(instance, timed):
            if effort <= 0:
                break
            order = _ahead(instance, by_start(instance, timed.starts), task, front)
            trial = justify(instance, place(instance, timed.chosen, order))
            effort -= 3 * len(instance)
            if (found := rank(objective, trial)) < best:
                timed, best = trial, found
                break
        if best == before:
            break
    return timed


def _jumps(instance: Instance, timed: Timed) -> Iterator[tuple[int, int]]:
    """(task, the one to go before): critical tasks that wait for their pool, longest wait first; before the earliest of those
    that hold it meanwhile, and before the last."""
    tiny = ROUNDING * timed.makespan
    late = latest(instance, timed)
    waits: list[tuple[float, int, float]] = []
    for i, choice in enumerate(timed.chosen):
        ready = max((timed.ends[n] for n in instance.needs[i]), default=0.0)
        wait = timed.starts[i] - ready
        if choice is not None and choice.seconds > 0 and wait > tiny and late[i] - timed.starts[i] <= tiny:
            waits.append((-wait, i, ready))
    for _, i, ready in sorted(waits):
        own = timed.chosen[i]
        held = [
            k
            for k, c in enumerate(timed.chosen)
            if c is not None and own is not None and c.pool == own.pool and c.seconds > 0
            if timed.starts[k] < timed.starts[i] and timed.ends[k] > ready
        ]
        held.sort(key=lambda k: (timed.starts[k], k))
        yield from ((i, k) for k in dict.fromkeys((held[0], held[-1])))


def _ahead(instance: Instance, order: list[int], task: int, front: int) -> list[int]:
    """The order with `task`, and what it needs, before `front`."""
    at = order.index(front)
    wanted, stack = {task}, [task]
    while stack:
        for need in instance.needs[stack.pop()]:
            if need not in wanted:
                wanted.add(need)
                stack.append(need)
    rest = order[at:]
    return [*order[:at], *(i for i in rest if i in wanted), *(i for i in rest if i not in wanted)]
