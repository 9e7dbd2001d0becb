"""How far the searched layouts are from what was published: `python benchmarks/planner_runs.py [--fit] [--found]`.

GPU-hours of whole runs, of which the table says neither layout nor batch nor software: each run is predicted with the factor and
the band of the other publishers' runs. Step times with the layout hidden. And with `--found`, the layout found for each
published one: never slower than it, if both fit. `--fit` writes famc/cost/data/runs.json anew. Needs scipy, as planner.py does.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from planner_fit import DATA, band
from scipy.stats import chi2, norm

from famc.backend import load_accelerator
from famc.cost.cases.rows import Case, case
from famc.cost.cases.unplaced import place
from famc.cost.device import Device
from famc.cost.layout import DoesNotFit
from famc.cost.search import Wanted, best, priced
from famc.cost.setup import Setup

RUNS = Path(__file__).parents[1] / "famc" / "cost" / "data" / "runs.json"
CONTENT, CONFIDENCE = 0.90, 0.95
"""The band holds this share of further publishers' runs, as sure as that: a tolerance interval of the normal distribution."""
HIDDEN = ("tp", "pp", "vpp", "cp", "ep", "dp", "micro_batch", "grad_accum", "sharding", "act_ckpt")
SWEEPS = ("vtrain-single",)
"""Sources that ran all layouts, good and bad: no measure of a search."""


@dataclass(frozen=True)
class Run:
    """A whole run: device-hours predicted from the other publishers' runs, with the band, and measured."""

    id: str
    model: str
    publisher: str
    measured: float
    bare: float  # the searched layout's, without factor
    predicted: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Score:
    """`mape`: mean over runs; `macro`: over publishers; `inside`: share of runs in their bands."""

    runs: tuple[Run, ...]
    mape: float
    macro: float
    inside: float
    factor: float  # of all runs, as are low and high
    low: float
    high: float

    def text(self) -> str:
        lines = [
            f"{'run':18s} {'model':28s} {'measured h':>11s} {'predicted h':>12s} {'error':>7s}  90 % band"
        ]
        for r in self.runs:
            lines.append(
                f"{r.id:18.18s} {r.model:28.28s} {r.measured:11,.0f} {r.predicted:12,.0f} {100 * (r.predicted / r.measured - 1):+6.0f}%"
                f"  {r.low:,.0f} to {r.high:,.0f}{'' if r.inside else '  OUTSIDE'}"
            )
        lines.append(
            f"MAPE {100 * self.mape:.1f} % ({100 * self.macro:.1f} % over publishers), {sum(r.inside for r in self.runs)} of "
            f"{len(self.runs)} inside their bands; each publisher's runs predicted from the others'"
        )
        lines.append(
            f"whole runs took {self.factor:.2f} x the searched layout's device-hours; band {self.low:.2f} to {self.high:.2f}"
        )
        return "\n".join(lines)


@cache
def device(name: str) -> Device:
    """A packaged backend."""
    return load_accelerator(name).device


def rows() -> list[dict[str, str]]:
    """Of the calibration table."""
    with DATA.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def publisher(row: dict[str, str]) -> str:
    """Who says so: the source up to a version or a remark."""
    return re.split(r"[@(]", row["source"])[0].strip()


def tolerance(n: int) -> float:
    """Standard deviations of `n` values on both sides of their mean that hold CONTENT of the population with CONFIDENCE
    (Howe 1969, doi:10.1080/01621459.1969.10500999)."""
    return float(
        norm.ppf((1 + CONTENT) / 2) * math.sqrt((n - 1) * (1 + 1 / n) / chi2.ppf(1 - CONFIDENCE, n - 1))
    )


def fitted(errors: Sequence[tuple[str, float]]) -> tuple[float, float, float]:
    """(mean, low, high) of log(measured / bare) by publisher, all publishers weighing the same."""
    by: dict[str, list[float]] = defaultdict(list)
    for name, e in errors:
        by[name].append(e)
    mean = float(np.mean([np.mean(v) for v in by.values()]))
    spread = math.sqrt(float(np.mean([np.mean([(e - mean) ** 2 for e in v]) for v in by.values()])))
    n = len(by)
    wide = tolerance(n) * spread * math.sqrt(n / (n - 1))
    return mean, mean - wide, mean + wide


def score(table: Iterable[dict[str, str]] | None = None) -> Score:
    """Scores the rows of whole runs of quality A and B."""
    found = []
    for row in table or rows():
        if row["kind"] == "gpu_hours" and row["quality"] in "AB":
            x = case(row, device)
            placed = place(row, x, device(x.backend))
            assert x.tokens is not None
            assert x.measured is not None
            assert x.seq_len is not None
            each = placed.batch * x.seq_len
            found.append((row, x, placed.step_seconds * placed.devices * x.tokens / each / 3600))
    errors = [(publisher(row), math.log(x.measured / bare)) for row, x, bare in found if x.measured]
    made = []
    for row, x, bare in found:
        own = publisher(row)
        mean, low, high = fitted([e for e in errors if e[0] != own])
        assert x.measured is not None
        made.append(
            Run(x.id, x.anatomy.name, own, x.measured, bare, *(bare * math.exp(v) for v in (mean, low, high)))
        )
    off = [(r.publisher, abs(r.predicted / r.measured - 1)) for r in made]
    each_publisher = {p: [e for q, e in off if q == p] for p, _ in off}
    factor, low, high = (math.exp(v) for v in fitted(errors))
    return Score(
        tuple(made),
        float(np.mean([e for _, e in off])),
        float(np.mean([np.mean(v) for v in each_publisher.values()])),
        sum(r.inside for r in made) / len(made),
        factor,
        low,
        high,
    )


# --- steps whose layout is hidden -------------------------------------------------------------------------


def hidden(table: Iterable[dict[str, str]]) -> list[tuple[str, str, float]]:
    """(source, id, log(predicted / measured)) of measured steps, A and B, without what HIDDEN says of their layout."""
    found = []
    for row in table:
        if row["kind"] != "throughput" or row["quality"] not in "AB" or row["src"] in SWEEPS:
            continue
        x = case(row | dict.fromkeys(HIDDEN, ""), device)
        if not x.step_seconds:
            continue
        try:
            placed = place(row | dict.fromkeys(HIDDEN, ""), x, device(x.backend))
        except DoesNotFit:
            found.append((x.src, x.id, math.nan))
            continue
        found.append((x.src, x.id, math.log(placed.step_seconds / x.step_seconds)))
    return found


def hidden_text(found: Sequence[tuple[str, str, float]]) -> tuple[str, tuple[float, float]]:
    """The table, and the band of measured / predicted, all sources weighing the same."""
    lines = [f"{'source':16s} rows  MAPE %  bias %  without a layout that fits"]
    kept = [x for x in found if not math.isnan(x[2])]
    means = []
    for src in sorted({x[0] for x in found}):
        e = np.array([x[2] for x in kept if x[0] == src])
        none = sum(math.isnan(x[2]) for x in found if x[0] == src)
        if not len(e):
            continue
        mape = float(np.mean(np.abs(np.exp(e) - 1)))
        means.append(mape)
        lines.append(
            f"{src:16s} {len(e):4d} {100 * mape:7.1f} {100 * (math.exp(float(np.median(e))) - 1):+7.1f}  {none or ''}".rstrip()
        )
    limits = band([x[0] for x in kept], np.array([x[2] for x in kept]))
    lines.append(
        f"macro-average {100 * float(np.mean(means)):.1f} %; 90 % of measured times lie within {limits[0]:.2f} to "
        f"{limits[1]:.2f} of the predicted one"
    )
    return "\n".join(lines), limits


# --- found against published ------------------------------------------------------------------------------


def against(table: Iterable[dict[str, str]]) -> str:
    """For each source the ratio of the found layout's modelled time to the published one's, where the model says that the
    published one fits."""
    by: dict[str, list[tuple[float, str]]] = defaultdict(list)
    unfit: dict[str, int] = defaultdict(int)
    for row in table:
        if row["kind"] != "throughput" or row["quality"] not in "AB" or row["src"] in SWEEPS:
            continue
        x: Case = case(row, device)
        if x.setup is None:
            continue
        own = priced(x.setup)
        if not own.fits:
            unfit[x.src] += 1
            continue
        made = best(wanted(x.setup), {"devices": x.setup.layout.devices})
        by[x.src].append((made.time.seconds / own.time.seconds, x.id))
    lines = [f"{'source':16s} rows  least  median  most   published ones that the model says do not fit"]
    for src, ratios in sorted(by.items()):
        v = sorted(ratios)
        lines.append(
            f"{src:16s} {len(v):4d} {v[0][0]:6.2f} {v[len(v) // 2][0]:7.2f} {v[-1][0]:6.3f}  {unfit[src] or ''} {v[-1][1] if v[-1][0] > 1.03 else ''}".rstrip()
        )
    return "\n".join(lines)


def wanted(s: Setup) -> Wanted:
    """The step of a setup, its layout left open."""
    lay = s.layout
    return Wanted(
        s.anatomy, s.device, s.seq_len, lay.global_batch, lay.nodes, s.per_node, lay.precision, "any", s.software, s.sharding,
        s.optimizer, s.trained, s.adapters, s.adapted, s.frozen_bytes, s.gradient_bytes, s.master, s.fused_loss, s.shapes,
        s.document,
    )  # fmt: skip


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--fit", action="store_true", help="store the factor and the bands")
    options.add_argument("--found", action="store_true", help="found layouts against published ones")
    chosen = options.parse_args()
    table = rows()
    made = score(table)
    print("GPU-hours of whole runs, layout, batch and software unknown\n" + made.text())
    text, limits = hidden_text(hidden(table))
    print("\nStep time, layout hidden, constants fitted to all sources\n" + text)
    if chosen.found:
        print("\nModelled time of the layout found / of the published one\n" + against(table))
    if chosen.fit:
        stored = {
            "about": "python benchmarks/planner_runs.py --fit",
            "factor": round(made.factor, 3),
            "low": round(made.low, 3),
            "high": round(made.high, 3),
            "searched": [round(x, 3) for x in limits],
            "mape_publisher_left_out": round(made.mape, 3),
            "runs": len(made.runs),
            "publishers": len({r.publisher for r in made.runs}),
        }
        RUNS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
