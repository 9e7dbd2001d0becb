"""How well famc tells a CPU's training steps in advance, and where the constants of famc/cost/cpu_time.py come from.

    python benchmarks/cpu_time.py                 # the stored steps and jobs against the formula; leaving one step out
    python benchmarks/cpu_time.py --fit           # the constants fitted anew to the stored steps
    python benchmarks/cpu_time.py --measure OUT   # this machine: its figures and all steps, as another such file (3 min)
    python benchmarks/cpu_time.py --data OUT      # any of these on that file

Exit 1 if a job of over 5 s is further off than 25 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from famc.backend import CpuMeasured
from famc.cost.cpu_rates import CpuRates
from famc.cost.cpu_time import FITTED, Constants, Step, lexical_seconds, step_seconds
from famc.cost.of_shape import anatomy
from famc.cost.shape import Shape

DATA = Path(__file__).parent / "data" / "cpu_steps.json"
NAMES = [f.name for f in fields(Constants)]
FIXED = {
    "follow",
    "whole",
    "bag",
}  # no plain step shows them: from head_loss with a teacher, trl's runs, lexical starts
PRIOR = 0.05  # how much a constant's own value counts, against one step's relative error
RANGE = (0.15, 8.0)  # times the value it has
PROMISE = 0.25


def shape_of(values: Mapping[str, Any]) -> Shape:
    """A stored step's model; positions up to its context."""
    known = {f.name for f in fields(Shape)}
    picked = {key: value for key, value in values.items() if key in known}
    return Shape(**{"tie": True, "context": 256, **picked})


def plain_step(row: Mapping[str, Any]) -> Step:
    """A stored step as the formula takes it."""
    return Step(
        anatomy(shape_of(row)),
        row["rows"],
        row["context"],
        precision=row["precision"],
        optimizer=row["optimizer"],
    )


def job_seconds(job: Mapping[str, Any], shapes: Mapping[str, Any], rates: CpuRates) -> float:
    """What the formula says of a stored job."""
    shape = shape_of(shapes[job["shape"]])
    step = Step(
        anatomy(shape),
        job["rows"],
        job["context"],
        passes=job.get("passes", 1),
        optimizer=job.get("optimizer", "adamw"),
        head=job.get("head", "fused"),
        teachers=(anatomy(shape_of(shapes[job["teacher"]])),) if "teacher" in job else (),
        follow=job.get("follow", False),
        recompute=job.get("recompute", False),
        varied=job.get("varied", False),
    )
    total = job["steps"] * step_seconds(step, rates).seconds
    if first := job.get("lexical"):
        total += lexical_seconds(
            first["steps"], first["batch"], first["columns"], shape, tuple(first["dims"]), rates
        )
    return total


def stored(path: Path) -> tuple[dict[str, Any], CpuRates]:
    """The file, and its CPU's rates as they were measured (residual 1)."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data, CpuMeasured.model_validate(data["rates"]).rates()


# --- fit ----------------------------------------------------------------------------------------------------


def linear(rows: Sequence[Mapping[str, Any]], rates: CpuRates) -> tuple[Any, Any, Any]:
    """Seconds of every step = base + parts @ constants (`product` by its inverse), and what was measured."""
    nothing = Constants(**dict.fromkeys(NAMES, 0.0) | {"product": 1e30})
    base, parts = [], []
    for row in rows:
        step = plain_step(row)

        def told(made: Constants, step: Step = step) -> float:
            found = step_seconds(step, rates, constants=made)
            return found.seconds - found.overhead

        base.append(told(nothing))
        parts.append([told(replace(nothing, **{name: 1.0})) - base[-1] for name in NAMES])
    return np.array(base), np.array(parts), np.array([row["seconds"] for row in rows])


def solve(base: Any, parts: Any, seconds: Any, rounds: int = 4000) -> Any:
    """Least squares of relative errors within bounds, each constant drawn to the value it has: coordinate descent."""
    start = np.array([1 / FITTED.product if n == "product" else getattr(FITTED, n) for n in NAMES])
    free = np.array([n not in FIXED for n in NAMES])
    matrix = np.vstack([parts / seconds[:, None], np.diag(PRIOR / start)])
    target = np.concatenate([1 - base / seconds, np.full(len(start), PRIOR)])
    x = start.copy()
    for _ in range(rounds):
        for i in np.flatnonzero(free):
            column = matrix[:, i]
            gap = target - matrix @ x + column * x[i]
            x[i] = np.clip(column @ gap / (column @ column), RANGE[0] * start[i], RANGE[1] * start[i])
    return x


def left_out(base: Any, parts: Any, seconds: Any) -> Any:
    """Relative error of each step by constants fitted to the others."""
    errors = []
    for i in range(len(seconds)):
        others = np.arange(len(seconds)) != i
        x = solve(base[others], parts[others], seconds[others], rounds=400)
        errors.append((base[i] + parts[i] @ x) / seconds[i] - 1)
    return np.array(errors)


# --- commands -----------------------------------------------------------------------------------------------


def report(path: Path) -> int:
    """Print steps and jobs; whether the jobs hold what is promised."""
    data, rates = stored(path)
    base, parts, seconds = linear(data["steps"], rates)
    told = np.array([step_seconds(plain_step(r), rates).seconds - rates.step_overhead for r in data["steps"]])
    error = told / seconds - 1
    for row, e in zip(data["steps"], error, strict=True):
        size = f"{row['arch']} {row['layers']} x {row['hidden']}, vocabulary {row['vocab']}, {row['rows']} x {row['context']}"
        print(f"{size:58} {row['precision']} {row['optimizer']:5} {row['seconds'] * 1e3:7.0f} ms  {e:+.0%}")
    out = left_out(base, parts, seconds)
    for name, e in (("fitted", error), ("one left out", out)):
        size = np.abs(e)
        print(
            f"{len(e)} steps, {name}: MAPE {size.mean():.1%}, median {np.median(size):.1%}, worst {size.max():.0%}"
        )
    held = True
    if data["jobs"]:
        rates = replace(rates, residual=data["job_residual"])
    for job in data["jobs"]:
        said = job_seconds(job, data["shapes"], rates)
        e = said / job["cpu_seconds"] - 1
        held &= abs(e) <= PROMISE or job["cpu_seconds"] < 5
        print(
            f"{job['name']:30} took {job['cpu_seconds']:6.1f} s of CPU, {job['wall_seconds']:6.1f} s; told {said:6.1f} s  {e:+.0%}"
        )
    return 0 if held else 1


def fit(path: Path) -> int:
    """Print the constants that the stored steps give."""
    data, rates = stored(path)
    for name, value in zip(NAMES, solve(*linear(data["steps"], rates)), strict=True):
        shown = 1 / value if name == "product" else value
        print(
            f"{name:12} {shown:8.2f}  (now {getattr(FITTED, name):g}{', not fitted here' if name in FIXED else ''})"
        )
    return 0


def measure(out: Path, path: Path) -> int:
    """Take all figures and steps on this machine."""
    import torch

    from famc.backend import cpu_model, detect_cpu
    from famc.backend.cpu import kernel_flags
    from famc.work.measure import measure as figures
    from famc.work.measure import real_step

    cores = detect_cpu().cores
    found = figures(cores=cores)
    torch.set_num_threads(1)
    data, _ = stored(path)
    for row in data["steps"]:
        row["seconds"] = round(
            real_step(shape_of(row), row["rows"], row["context"], row["precision"], row["optimizer"], 1.5), 5
        )
        print(row, flush=True)
    here = {"date": "", "cpu_model": cpu_model(), "cores": cores, "flags": kernel_flags()}
    made = {
        **data,
        "rates": {**found, **here, "residual": None},
        "job_residual": found["residual"],
        "jobs": [],
    }
    out.write_text(json.dumps(made, indent=1), encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--measure", type=Path, metavar="OUT")
    asked = parser.parse_args()
    if asked.measure:
        return measure(asked.measure, asked.data)
    return fit(asked.data) if asked.fit else report(asked.data)


if __name__ == "__main__":
    sys.exit(main())
