"""Serial schedule generation: tasks in an order, each at the earliest time when its needs have ended and its pool has room.

In: an Instance, the option chosen for each task, an order. Out: start and end of each. Some order gives an optimal schedule
(Kolisch 1996, doi:10.1016/0377-2217(95)00357-6: the active schedules), and scheduling again in the order of the starts never
ends later: each task finds at its old place no more than what was there. Times are half-open: one task starts where
another ends. What takes no time takes no room.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from famc.schedule.problem import Choice, Instance


class Profile:
    """Units of a pool in use over time: `used[i]` from `times[i]` to `times[i + 1]`, and to the end of time."""

    __slots__ = ("capacity", "times", "used")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.times = [0.0]
        self.used = [0]

    def earliest(self, ready: float, seconds: float, units: int) -> float:
        """The first time from `ready` on with `units` free for `seconds`. There is one, as units <= capacity."""
        times, used, room = self.times, self.used, self.capacity - units
        i = bisect_right(times, ready) - 1
        start, last = ready, len(times) - 1
        while True:
            if used[i] > room:
                start = times[i + 1]
            elif i == last or times[i + 1] >= start + seconds:
                return start
            i += 1

    def take(self, start: float, end: float, units: int) -> None:
        """`units` more from `start` to `end`."""
        used = self.used
        for i in range(self._cut(start), self._cut(end)):
            used[i] += units

    def _cut(self, time: float) -> int:
        i = bisect_right(self.times, time) - 1
        if self.times[i] == time:
            return i
        self.times.insert(i + 1, time)
        self.used.insert(i + 1, self.used[i])
        return i + 1


@dataclass(frozen=True, slots=True)
class Timed:
    """A schedule by numbers. `chosen` None: nothing to run."""

    chosen: tuple[Choice | None, ...]
    starts: tuple[float, ...]
    ends: tuple[float, ...]
    makespan: float
    cost: float


@dataclass(frozen=True, slots=True)
class Prices:
    """What a relaxation makes of time: `path` of a second of each task, `pool` of a unit and second; `time` and `money`:
    weights of the makespan and of the cost."""

    path: tuple[float, ...]
    pool: tuple[float, ...]
    time: float
    money: float


def place(instance: Instance, chosen: Sequence[Choice | None], order: Sequence[int]) -> Timed:
    """The schedule of `order`, in which each task is behind its needs."""
    starts, ends = _place(instance.needs, instance.capacity, chosen, order)
    return Timed(tuple(chosen), tuple(starts), tuple(ends), max(ends, default=0.0), cost(chosen))


def cost(chosen: Sequence[Choice | None]) -> float:
    """USD of all."""
    return sum(c.cost for c in chosen if c is not None)


def place_priced(
    instance: Instance,
    order: Sequence[int],
    prices: Prices,
    floor: float,
    scale: Sequence[float] | None = None,
) -> Timed:
    """As `place`, each task with the option that is cheapest at `prices`, where and when there is room for it: (the price of
    its seconds + `floor`) x its end + the pool's price x the work + the cost. With a high floor, all options end soon; with a
    low one, only those on a critical path do. `scale`: factors of the tasks' prices."""
    profiles = [Profile(units) for units in instance.capacity]
    starts, ends = [0.0] * len(instance), [0.0] * len(instance)
    chosen: list[Choice | None] = [None] * len(instance)
    time, money = prices.time, prices.money
    for i in order:
        ready = 0.0
        for need in instance.needs[i]:
            if ends[need] > ready:
                ready = ends[need]
        least, begin = 0.0, ready
        picked: Choice | None = None
        late = time * (prices.path[i] + floor) * (scale[i] if scale else 1.0)
        for c in instance.choices[i]:
            start = ready
            if c.seconds > 0:
                start = profiles[c.pool].earliest(ready, c.seconds, c.units)
            value = (
                late * (start + c.seconds) + time * prices.pool[c.pool] * c.units * c.seconds + money * c.cost
            )
            if picked is None or value < least:
                least, begin, picked = value, start, c
        chosen[i], starts[i], ends[i] = picked, begin, begin
        if picked is not None and picked.seconds > 0:
            ends[i] = begin + picked.seconds
            profiles[picked.pool].take(begin, ends[i], picked.units)
    return Timed(tuple(chosen), tuple(starts), tuple(ends), max(ends, default=0.0), cost(chosen))


def place_in_turn(instance: Instance, chosen: Sequence[Choice | None]) -> tuple[float, ...]:
    """Starts where tasks take the units that are free first, in the caller's order, and nothing is put into gaps. Units that
    a task waits with stay idle."""
    free = [[0.0] * units for units in instance.capacity]
    starts, ends = [0.0] * len(instance), [0.0] * len(instance)
    for i in instance.order:
        ready = max((ends[n] for n in instance.needs[i]), default=0.0)
        choice = chosen[i]
        starts[i] = ends[i] = ready
        if choice is not None and choice.seconds > 0:
            lanes = free[choice.pool]
            starts[i] = max(ready, lanes[choice.units - 1])
            ends[i] = starts[i] + choice.seconds
            lanes[: choice.units] = [ends[i]] * choice.units
            lanes.sort()
    return tuple(starts)


def latest(instance: Instance, timed: Timed) -> tuple[float, ...]:
    """The latest start of each task with the same makespan and options: the schedule from the back, those that end last
    first. No task starts earlier than in `timed`, rounding aside."""
    position = _position(instance)
    order = sorted(range(len(instance)), key=lambda i: (-timed.ends[i], -position[i]))
    _, ends = _place(instance.followers, instance.capacity, timed.chosen, order)
    return tuple(timed.makespan - end for end in ends)


def justify(instance: Instance, timed: Timed, rounds: int = 4) -> Timed:
    """Shift all to the end and back to the front until that gains nothing (double justification: Valls et al. 2005,
    doi:10.1016/j.ejor.2004.04.008)."""
    for _ in range(rounds):
        shifted = place(instance, timed.chosen, by_start(instance, latest(instance, timed)))
        if not shifted.makespan < timed.makespan * (1 - 1e-9):
            return timed
        timed = shifted
    return timed


def by_start(instance: Instance, starts: Sequence[float]) -> list[int]:
    """Tasks by start, those that start together as in the instance's order."""
    position = _position(instance)
    return sorted(range(len(instance)), key=lambda i: (starts[i], position[i]))


def by_tail(
    instance: Instance, chosen: Sequence[Choice | None], scale: Sequence[float] | None = None
) -> list[int]:
    """Tasks by the longest chain that starts with them, longest first: each is behind its needs. `scale`: factors of the
    tasks' seconds."""
    tails = [0.0] * len(instance)
    position = [0] * len(instance)
    for at in range(len(instance) - 1, -1, -1):
        i = instance.order[at]
        position[i] = at
        choice = chosen[i]
        own = 0.0 if choice is None else choice.seconds * (scale[i] if scale else 1.0)
        tails[i] = own + max((tails[f] for f in instance.followers[i]), default=0.0)
    return sorted(range(len(instance)), key=lambda i: (-tails[i], position[i]))


def _position(instance: Instance) -> list[int]:
    position = [0] * len(instance)
    for place_, i in enumerate(instance.order):
        position[i] = place_
    return position


def _place(
    needs: Sequence[tuple[int, ...]],
    capacity: Sequence[int],
    chosen: Sequence[Choice | None],
    order: Sequence[int],
) -> tuple[list[float], list[float]]:
    profiles = [Profile(units) for units in capacity]
    starts, ends = [0.0] * len(needs), [0.0] * len(needs)
    for i in order:
        start = 0.0
        for need in needs[i]:
            if ends[need] > start:
                start = ends[need]
        choice = chosen[i]
        if choice is None or choice.seconds == 0:
            starts[i] = ends[i] = start
            continue
        profile = profiles[choice.pool]
        start = profile.earliest(start, choice.seconds, choice.units)
        starts[i] = start
        ends[i] = start + choice.seconds
        profile.take(start, ends[i], choice.units)
    return starts, ends
