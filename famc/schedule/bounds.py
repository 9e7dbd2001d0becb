"""What no schedule can beat: windows of the tasks, options that no schedule within the limits has, the least makespan.

In: an Instance. Out: numbers and smaller Instances. Every bound holds for every schedule, whatever the solver: the gap that
is printed is one.
"""

from __future__ import annotations

from dataclasses import dataclass

from famc.schedule.problem import Choice, Instance

HEADS = 48  # begins that the interval bound tries at most


@dataclass(frozen=True, slots=True)
class Windows:
    """With all tasks at their fastest and nothing waiting for room: the earliest start, and the least from an end to the
    schedule's end."""

    heads: tuple[float, ...]
    tails: tuple[float, ...]


def windows(instance: Instance) -> Windows:
    """Longest paths to and from each task."""
    fastest = [min((c.seconds for c in choices), default=0.0) for choices in instance.choices]
    heads, tails = [0.0] * len(instance), [0.0] * len(instance)
    for i in instance.order:
        heads[i] = max((heads[n] + fastest[n] for n in instance.needs[i]), default=0.0)
    for i in reversed(instance.order):
        tails[i] = max((tails[f] + fastest[f] for f in instance.followers[i]), default=0.0)
    return Windows(tuple(heads), tuple(tails))


def within(
    instance: Instance, deadline: float | None, budget: float | None
) -> tuple[Instance, tuple[int, ...]]:
    """The instance without options that no schedule within the limits can have, and the tasks that are left with none."""
    seen = windows(instance)
    least = [min((c.cost for c in choices), default=0.0) for choices in instance.choices]
    spare = None if budget is None else budget - sum(least)
    late = None if deadline is None else deadline * (1 + 1e-9)
    kept: list[tuple[Choice, ...]] = []
    for i, choices in enumerate(instance.choices):
        kept.append(
            tuple(
                c
                for c in choices
                if (late is None or seen.heads[i] + c.seconds + seen.tails[i] <= late)
                and (spare is None or c.cost - least[i] <= spare + 1e-9 * (1 + abs(spare)))
            )
        )
    lost = tuple(i for i, c in enumerate(kept) if instance.choices[i] and not c)
    return Instance(instance.needs, instance.followers, instance.order, tuple(kept), instance.capacity), lost


def least_time(instance: Instance) -> float:
    """A lower bound of the makespan: the fastest critical path, what must run between its begin and its end, or what can't run
    beside each other."""
    seen = windows(instance)
    fastest = [min((c.seconds for c in choices), default=0.0) for choices in instance.choices]
    path = max((h + f + t for h, f, t in zip(seen.heads, fastest, seen.tails, strict=True)), default=0.0)
    return max(path, _intervals(instance, seen), _alternating(instance, seen))


def _intervals(instance: Instance, seen: Windows) -> float:
    """Tasks of one pool that can't start before h and leave at least q behind them: h + their work / units + q.

    Work is counted in three ways that all hold (dual feasible functions, Fekete & Schepers 2001,
    doi:10.1007/s101070100243): as it is; a task of more than half of the units as all of them, one of less as nothing.
    """
    best = 0.0
    for pool, capacity in enumerate(instance.capacity):
        own = [i for i, c in enumerate(instance.choices) if c and all(o.pool == pool for o in c)]
        for wide in (False, True):
            work = {
                i: min(o.seconds * _share(o.units, capacity, wide) for o in instance.choices[i]) for i in own
            }
            busy = [i for i in own if work[i] > 0]
            by_tail = sorted(busy, key=lambda i: -seen.tails[i])
            heads = sorted({seen.heads[i] for i in busy})
            for head in heads[:: max(1, -(-len(heads) // HEADS))]:
                total = 0.0
                for i in by_tail:
                    if seen.heads[i] >= head:
                        total += work[i]
                        value = head + total + seen.tails[i]
                        if value > best:
                            best = value
    return best


def _alternating(instance: Instance, seen: Windows) -> float:
    """Tasks so wide that nothing of their pool runs beside them take turns with all the others: their sum, and the longest
    chain of the others or their work over the units."""
    best = 0.0
    for pool, capacity in enumerate(instance.capacity):
        narrowest = min((o.units for c in instance.choices for o in c if o.pool == pool), default=1)
        own = [i for i, c in enumerate(instance.choices) if c and all(o.pool == pool for o in c)]
        alone = {i for i in own if all(o.units > capacity - narrowest for o in instance.choices[i])}
        seconds = {i: min(o.seconds for o in instance.choices[i]) for i in own}
        beside = [i for i in own if i not in alone]
        work = sum(min(o.seconds * o.units for o in instance.choices[i]) for i in beside)
        chains = [0.0] * len(instance)
        for i in instance.order:
            chains[i] = max((chains[n] for n in instance.needs[i]), default=0.0)
            if i in seconds and i not in alone:
                chains[i] += seconds[i]
        others = max(max(chains, default=0.0), work / capacity if capacity else 0.0)
        busy = [i for i in own if seconds[i] > 0]
        head = min((seen.heads[i] for i in busy), default=0.0)
        tail = min((seen.tails[i] for i in busy), default=0.0)
        best = max(best, head + sum(seconds[i] for i in alone) + others + tail)
    return best


def _share(units: int, capacity: int, wide: bool) -> float:
    """Of the pool's units."""
    if not wide:
        return units / capacity
    return 1.0 if 2 * units > capacity else 0.5 if 2 * units == capacity else 0.0


def least_cost(instance: Instance) -> float:
    """USD of all tasks at their cheapest."""
    return sum(min((c.cost for c in choices), default=0.0) for choices in instance.choices)
