"""When each step runs, and on how much: steps are moldable tasks on pools of limited units.

problem.py: tasks, options, pools, objectives, schedules. place.py: tasks in an order, each as early as there is room.
bounds.py, relax.py: what no schedule can beat. greedy.py, improve.py: a good schedule in milliseconds, by rank.py's
measure. exact.py: the same by CP-SAT.
solve.py: all of them, and why there is none.
"""

from famc.schedule.problem import Objective, Option, Placed, Schedule, Task
from famc.schedule.solve import schedule

__all__ = ["Objective", "Option", "Placed", "Schedule", "Task", "schedule"]
