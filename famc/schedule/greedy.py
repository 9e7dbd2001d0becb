"""A schedule in milliseconds: options from the relaxation, tasks placed by the length of what follows them, then improved.

In: an Instance, an Objective, its Relaxations. Out: the best Timed found. The same answer each time: no clock and no chance
decides. The two phases are those of Lepère, Trystram & Woeginger 2002 (doi:10.1142/S0129054102001308): first how wide each
task is, then list scheduling.
"""

from __future__ import annotations

from collections.abc import Iterator

from famc.schedule.improve import improved, reordered, repriced, resampled
from famc.schedule.place import Timed, by_start, by_tail, justify, place, place_in_turn, place_priced
from famc.schedule.problem import Choice, Instance, Objective
from famc.schedule.rank import ROUNDING, Key, rank
from famc.schedule.relax import Relaxations, Relaxed, cheapest_choices, fastest_choices

Chosen = tuple[Choice | None, ...]

TRIES = 3  # choices of one relaxation that are placed
EFFORT = 120_000  # tasks placed to improve a schedule, where something is asked for: 0.3 to 1 s
FEW = 3000  # tasks up to which one choice of options is placed in several orders: beyond, a plan must not wait for it
FLOORS = (0.001, 0.01, 0.03, 0.1, 1.0)  # prices of a second that no path asks for
LANES = 4096  # units of all pools up to which tasks are also placed in turn


def greedy(
    instance: Instance, objective: Objective, relaxed: Relaxations, bound: float = 0.0, effort: int = EFFORT
) -> Timed:
    """The best schedule found; not within the limits where none such was found. `bound`: a lower one of the makespan: where
    tasks have one option each and it is reached, nothing more is tried. `effort`: tasks placed while improving, at most."""
    only = all(len(c) < 2 for c in instance.choices)

    best: Timed | None = None
    for chosen in dict.fromkeys(_choices(instance, relaxed, only)):
        for timed in _placed(instance, chosen):
            if best is None or rank(objective, timed) < rank(objective, best):
                best = timed
            if only and best.makespan <= bound * (1 + ROUNDING):
                return best
    assert best is not None  # there is always the cheapest choice
    if only and len(instance) > FEW:
        return best
    if only:
        best = reordered(instance, objective, best, bound, effort // 2)
        return resampled(instance, objective, best, bound, effort // 2)
    guides = [relaxed.fast, *(r for _, r in relaxed.priced)]
    tried: list[tuple[Key, Relaxed, float]] = []
    for guide in guides:
        order = by_tail(instance, guide.choices[0])
        for floor in FLOORS:
            timed = justify(instance, place_priced(instance, order, guide.prices, floor))
            tried.append((rank(objective, timed), guide, floor))
            best = timed if rank(objective, timed) < rank(objective, best) else best
    _, guide, floor = min(tried, key=lambda t: t[0])
    best = repriced(instance, objective, best, guide, floor, effort // 2)
    best = improved(instance, objective, best, effort // 4)
    return reordered(instance, objective, best, bound, effort // 4)


def _choices(instance: Instance, relaxed: Relaxations, only: bool) -> Iterator[Chosen]:
    """The extremes, then the relaxation's at several prices of time."""
    yield cheapest_choices(instance)
    if only:
        return
    yield fastest_choices(instance)
    yield from relaxed.fast.choices[:TRIES]
    for _, one in relaxed.priced:
        yield from one.choices[:TRIES]


def _placed(instance: Instance, chosen: Chosen) -> Iterator[Timed]:
    """Schedules of one choice of options."""
    first = place(instance, chosen, by_tail(instance, chosen))
    if len(instance) > FEW:
        yield first
        return
    yield justify(instance, first)
    yield justify(instance, place(instance, chosen, instance.order))
    if sum(instance.capacity) <= LANES:
        yield justify(instance, place(instance, chosen, by_start(instance, place_in_turn(instance, chosen))))
