"""How far the planner's step times and memory are from published ones: `python benchmarks/planner.py [--quick] [--fit] [--rows SRC]`.

Prints errors of the fitted constants, and those of each source and each chip predicted by a fit that has not seen it; the
targets are on the latter. `--fit` writes famc/cost/data/fitted.json anew.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import replace

import planner_memory
import planner_runs
from planner_fit import DATA, Case, Score, band, errors, fit, leave_out, load, prior, scores, timed, write

from famc.cost import sums
from famc.cost.fitted import constants
from famc.cost.software import guess
from famc.cost.step_time import step_time

TARGETS = "MAPE <= 12 %, median <= 8 %, >= 85 % within 20 %"


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="errors of the stored constants alone")
    options.add_argument("--fit", action="store_true", help="fit the constants and store them")
    options.add_argument("--rows", metavar="SRC", help="print each row of a source with its parts")
    chosen = options.parse_args()

    everything = load()
    cases = timed(everything)
    if chosen.rows:
        rows([x for x in cases if x.src == chosen.rows])
        return
    print(parameters(everything))
    start = time.perf_counter()
    sources = [x.src for x in cases]
    fitted = fit(cases) if chosen.fit else constants()
    show("Step time, constants fitted to all sources", scores(sources, errors(cases, fitted)))
    took = (time.perf_counter() - start) / len(cases)
    if not chosen.fit:
        print(f"{1e6 * took:.0f} us a row\n")
    if chosen.quick:
        return
    with DATA.open(encoding="utf-8") as lines:
        print("Peak memory")
        print(planner_memory.score(r for r in csv.DictReader(lines) if r["kind"] == "memory").text(), "\n")
    print(f"GPU-hours of whole runs, layout unknown\n{planner_runs.score().text()}\n")
    show("Step time, constants before any fit", scores(sources, errors(cases, prior())))
    e = leave_out(cases, fitted, lambda x: x.src)
    left_out = scores(sources, e)
    show(f"Step time, each source left out of its fit ({TARGETS})", left_out)
    limits = band(sources, e)
    print(f"90 % of measured times lie within {limits[0]:.2f} to {limits[1]:.2f} of the predicted one\n")
    strange = scores(sources, leave_out([nameless(x) for x in cases], fitted, lambda x: x.src, cases))
    show("The same, each source's software unknown too: guessed from its layout and year", strange)
    chips = [x.backend for x in cases]
    by_chip = scores(chips, leave_out(cases, fitted, lambda x: x.backend))
    show("Step time, each chip left out of its fit", by_chip)
    if chosen.fit:
        write(fitted, left_out, limits)


def nameless(x: Case) -> Case:
    """The case as of software that is not stated: guessed from its layout."""
    assert x.setup is not None
    name = guess(x.setup.layout, x.setup.sharding)
    return replace(x, setup=replace(x.setup, software=replace(x.setup.software, name=name)))


def parameters(cases: list[Case]) -> str:
    """Parameter counts that are published, and how many of them are met exactly."""
    rows = [x for x in cases if x.kind == "params"]
    exact = sum(sums.parameters(x.anatomy) == x.measured for x in rows)
    return f"Parameters: {exact} of {len(rows)} published counts exact\n"


def show(title: str, table: dict[str, Score]) -> None:
    """One table."""
    print(title)
    print(f"  {'':16s} {'rows':>5s} {'bias %':>7s} {'MAPE %':>7s} {'median %':>8s} {'<= 20 %':>8s}")
    for key, s in table.items():
        print(
            f"  {key:16s} {s.rows:5d} {100 * s.bias:+7.1f} {100 * s.mape:7.1f} {100 * s.median:8.1f} {100 * s.within:8.1f}"
        )
    print()


def rows(cases: list[Case]) -> None:
    """Each case with its error and the shares of its parts."""
    for x in cases:
        assert x.setup is not None
        assert x.step_seconds is not None
        t, lay = step_time(x.setup), x.setup.layout
        shares = [
            (n, getattr(t, n))
            for n in ("matmul", "attention", "vector", "launch", "bubble", "optimizer", "overhead")
        ]
        parts = " ".join(
            f"{n} {100 * v / t.seconds:.0f}" for n, v in (*shares, *t.communication) if v > 0.005 * t.seconds
        )
        spread = f"tp{lay.tp} pp{lay.pp}x{x.setup.vpp} cp{lay.cp} ep{lay.ep} dp{lay.data}"
        batch = f"{lay.micro_batch}x{lay.grad_accum}x{x.seq_len}"
        print(
            f"{x.id:20s} {x.anatomy.name:16.16s} {x.backend:14.14s} {x.precision:6.6s} {batch:12s} {spread:24s} "
            f"{x.step_seconds:8.3f} s {100 * (t.seconds / x.step_seconds - 1):+6.1f} %  {parts}"
        )


if __name__ == "__main__":
    main()
