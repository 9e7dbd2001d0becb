"""Which of two schedules is better, by an Objective.

In: an Objective, a makespan and a cost. Out: a key to sort by.
"""

from __future__ import annotations

from famc.schedule.place import Timed
from famc.schedule.problem import Objective

Key = tuple[float, float, float]

ROUNDING = 1e-9  # by so much a limit may be passed


def key(objective: Objective, makespan: float, cost: float) -> Key:
    """Less is better: first the limits (the shares by which they are passed), then what is minimised, then the other."""
    over = 0.0
    if objective.deadline is not None and makespan > objective.deadline * (1 + ROUNDING):
        over += makespan / objective.deadline - 1
    if objective.budget is not None and cost > objective.budget * (1 + ROUNDING):
        over += (cost - objective.budget) / max(objective.budget, 0.01)
    return (over, makespan, cost) if objective.goal == "time" else (over, cost, makespan)


def kept(objective: Objective, timed: Timed) -> bool:
    """Whether a schedule is within the limits."""
    return key(objective, timed.makespan, timed.cost)[0] == 0


def rank(objective: Objective, timed: Timed) -> Key:
    """The key of a schedule."""
    return key(objective, timed.makespan, timed.cost)
